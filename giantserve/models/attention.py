"""Attention of a flat batch of tokens over paged KV blocks.

Shapes: T tokens of the pass, B sequences, Q queries of one sequence, L context length, H query
heads, K KV heads, G = H / K, D head dim, N blocks of a table, S block size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from giantserve.models.batch import DecodeGroup, PassBatch, PromptChunk
from giantserve.models.native_attention import load_native_attention
from giantserve.models.pass_kv import PassKV
from giantserve.models.varlen import attend_batch, can_attend
from kvcache.kv_store import KVViews, write_tokens
from partition.meta_model import LocalMask

CACHED_BYTES = 4 << 20
"""Of gathered keys, and as much of values, that a CPU attends to at once: larger ones leave its
caches, and their memory comes anew from the system each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What a layer's attention does beside softmax(q k^T) v. ``sinks`` [H]: a logit per head with
    no value."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def plain(self) -> bool:
        """Whether scaled_dot_product_attention computes it."""
        return self.softcap is None and self.sinks is None

    def on(self, device: torch.device) -> AttentionOptions:
        """The same for tensors on ``device``."""
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device))


class PagedAttention:
    """The attention function of one shard's model: appends the pass's KV to the blocks, then
    attends.

    One object per shard, bound to its model; ``kv`` is set before every pass. ``exact``: see
    `attend_decodes_exactly`.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self.kv: PassKV | None = None
        self._exact = exact
        self._native = None if exact else load_native_attention()

    def __call__(
        self,
        module: nn.Module,
        query_1HTD: torch.Tensor,
        key_1KTD: torch.Tensor,
        value_1KTD: torch.Tensor,
        attention_mask: LocalMask | None = None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor, None]:
        assert self.kv is not None
        batch = self.kv.batch
        layer: int = module.layer_idx  # type: ignore[assignment]
        options = AttentionOptions(
            scaling=query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling,
            window=attention_mask.size if attention_mask is not None else None,
            softcap=softcap,
            sinks=s_aux,
        )
        query_THD = query_1HTD[0].transpose(0, 1)
        out_THD = query_THD.new_empty(*query_THD.shape[:2], value_1KTD.shape[-1])
        if batch.gathered:
            self._attend_gathered(query_THD, key_1KTD[0], value_1KTD[0], options, out_THD)
            return out_THD.unsqueeze(0), None
        key_THD, value_THD = key_1KTD[0].transpose(0, 1), value_1KTD[0].transpose(0, 1)
        for part, views in self.kv.parts(layer):
            where = part.batch.block_ids, part.batch.offsets
            write_tokens(views, part.of(key_THD), part.of(value_THD), *where)
            if part.in_place:
                self._attend_part(query_THD, views, part.batch, options, out_THD)
            else:
                query = part.of(query_THD)
                out = query.new_empty(query.shape[0], *out_THD.shape[1:])
                here = options.on(query.device)
                self._attend_part(query, views, part.batch, here, out)
                out_THD[part.rows] = out.to(out_THD.device)
        return out_THD.unsqueeze(0), None

    def _attend_part(
        self,
        query_THD: torch.Tensor,
        views: KVViews,
        batch: PassBatch,
        options: AttentionOptions,
        out_THD: torch.Tensor,
    ) -> None:
        """Attention of all of ``batch``'s rows, into ``out_THD``."""
        keys, values = views
        if not self._exact and can_attend(query_THD, values, options):
            out_THD.copy_(attend_batch(query_THD, keys, values, batch, options))
            return
        native = self._native
        if native is not None and not native.can_attend(query_THD, keys, values):
            native = None
        attend_group = attend_decodes_exactly if self._exact and options.plain else attend_decodes
        for group in batch.decodes:
            if native is not None:
                native.attend(query_THD, keys, values, group, options, out_THD)
            else:
                query = query_THD[group.rows]
                out_THD[group.rows] = attend_group(query, keys, values, group, options)
        for chunk in batch.prompts:
            rows = slice(chunk.row, chunk.row + chunk.length)
            query_HQD = query_THD[rows].transpose(0, 1)
            if chunk.whole is not None:
                out_HQD = _attend_in_whole(query_HQD, keys, values, chunk, chunk.whole, options)
            else:
                first = _first_visible(chunk.start, options.window) // batch.block_size
                skipped = first * batch.block_size
                length = chunk.start + chunk.length - skipped
                out_HQD = attend(
                    query_HQD,
                    gather(keys, chunk.table[first:], length),
                    gather(values, chunk.table[first:], length),
                    options,
                    query_start=chunk.start - skipped,
                )
            out_THD[rows] = out_HQD.transpose(0, 1)

    def _attend_gathered(
        self,
        query_THD: torch.Tensor,
        key_KLD: torch.Tensor,
        value_KLD: torch.Tensor,
        options: AttentionOptions,
        out_THD: torch.Tensor,
    ) -> None:
        """Attend where keys and values of all sequences' whole contexts come one after the
        other."""
        assert self.kv is not None
        begin = 0
        for chunk in self.kv.batch.all_chunks():
            end = begin + chunk.start + chunk.length
            rows = slice(chunk.row, chunk.row + chunk.length)
            out_THD[rows] = attend(
                query_THD[rows].transpose(0, 1),
                key_KLD[:, begin:end],
                value_KLD[:, begin:end],
                options,
                query_start=chunk.start,
            ).transpose(0, 1)
            begin = end


def _attend_in_whole(
    query_HQD: torch.Tensor,
    keys_NSKD: torch.Tensor,
    values_NSKD: torch.Tensor,
    chunk: PromptChunk,
    whole: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of a chunk with the bits that it has where all ``whole`` tokens of its prompt are
    attended to at once: how torch's kernel parts rows and columns shows in them."""
    end = chunk.start + chunk.length
    query = F.pad(query_HQD, (0, 0, chunk.start, whole - end))
    keys, values = (
        F.pad(gather(blocks, chunk.table, end), (0, 0, 0, whole - end))
        for blocks in (keys_NSKD, values_NSKD)
    )
    return attend(query, keys, values, options, query_start=0)[:, chunk.start : end]


def gather(blocks_NSKD: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` tokens of a block table, as [K, length, D]."""
    size = blocks_NSKD.shape[1]
    picked = blocks_NSKD.index_select(0, table[: -(-length // size)])
    return picked.flatten(0, 1)[:length].transpose(0, 1)


def _gather_tables(blocks_NSKD: torch.Tensor, tables_BN: torch.Tensor) -> torch.Tensor:
    """All tokens of B block tables of N blocks, as [B, K, N * S, D]."""
    picked = blocks_NSKD.index_select(0, tables_BN.flatten())
    return picked.view(tables_BN.shape[0], -1, *blocks_NSKD.shape[2:]).transpose(1, 2)


def _first_visible(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def attend_decodes(
    query_BHD: torch.Tensor,
    keys_NSKD: torch.Tensor,
    values_NSKD: torch.Tensor,
    group: DecodeGroup,
    options: AttentionOptions,
) -> torch.Tensor:
    """One query a sequence, each over its own context, padded to the group's longest. Returns [B,
    H, D].

    On a CPU as many sequences at a time as keep what is gathered in its caches.
    """
    together = query_BHD.shape[0]
    if query_BHD.device.type == "cpu":
        together = max(1, CACHED_BYTES // (group.tables.shape[1] * keys_NSKD[0].nbytes))
    parts = []
    for query, tables, lengths in zip(
        torch.split(query_BHD, together),
        torch.split(group.tables, together),
        torch.split(group.lengths, together),
        strict=True,
    ):
        keys, values = (_gather_tables(blocks, tables) for blocks in (keys_NSKD, values_NSKD))
        parts.append(_attend_padded(query, keys, values, lengths, options))
    return torch.cat(parts)


def attend_decodes_exactly(
    query_BHD: torch.Tensor,
    keys_NSKD: torch.Tensor,
    values_NSKD: torch.Tensor,
    group: DecodeGroup,
    options: AttentionOptions,
) -> torch.Tensor:
    """As `attend_decodes`, to the bit what transformers computes with
    scaled_dot_product_attention.

    Contexts of one length together, unpadded and unmasked, and each query head by itself: padding
    moves a row's end to where torch's kernel takes another exp, and heads as rows of one product
    are summed in another order.
    """
    out_BHD = query_BHD.new_empty(*query_BHD.shape[:2], values_NSKD.shape[-1])
    block_size = keys_NSKD.shape[1]
    for length in sorted(set(group.lengths.tolist())):
        (members,) = torch.nonzero(group.lengths == length, as_tuple=True)
        first = _first_visible(length - 1, options.window)
        skipped = first // block_size
        tables = group.tables[members, skipped : -(-length // block_size)]
        visible = slice(first - skipped * block_size, length - skipped * block_size)
        keys, values = (
            _gather_tables(blocks, tables)[:, :, visible].contiguous()
            for blocks in (keys_NSKD, values_NSKD)
        )
        query = query_BHD[members].unsqueeze(2)
        found = F.scaled_dot_product_attention(
            query, keys, values, scale=options.scaling, enable_gqa=keys.shape[1] != query.shape[1]
        )
        out_BHD[members] = found.squeeze(2)
    return out_BHD


def _attend_padded(
    query_BHD: torch.Tensor,
    keys_BKLD: torch.Tensor,
    values_BKLD: torch.Tensor,
    lengths: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Each query over the first of its keys, ``lengths`` [B] of them. Zeroes the keys and values
    that it may not see: they may be no numbers, which a weight of 0 would not hide."""
    batch, heads, dim = query_BHD.shape
    positions = torch.arange(keys_BKLD.shape[2], device=query_BHD.device)
    visible = positions < lengths[:, None]
    if options.window is not None:
        visible = visible & (positions >= lengths[:, None] - options.window)
    for tensor in (keys_BKLD, values_BKLD):
        tensor.masked_fill_(~visible[:, None, :, None], 0)
    kv_heads = keys_BKLD.shape[1]
    query = query_BHD.view(batch, kv_heads, heads // kv_heads, dim)
    mask = visible[:, None, None, :]
    if options.plain:
        out = _scaled_dot_product(query, keys_BKLD, values_BKLD, mask, options.scaling)
    else:
        out = _attend_explicitly(query, keys_BKLD, values_BKLD, mask, options)
    return out.reshape(batch, heads, -1)


def attend(
    query_HQD: torch.Tensor,
    key_KLD: torch.Tensor,
    value_KLD: torch.Tensor,
    options: AttentionOptions,
    *,
    query_start: int,
) -> torch.Tensor:
    """Causal attention of one sequence's queries, the first of which stands at ``query_start`` of
    the context. Returns [H, Q, D]."""
    heads, queries, dim = query_HQD.shape
    kv_heads, length, _ = key_KLD.shape
    mask = None
    windowed = options.window is not None and options.window < length
    if query_start or windowed or not options.plain:
        row = torch.arange(query_start, query_start + queries, device=query_HQD.device)[:, None]
        column = torch.arange(length, device=query_HQD.device)
        mask = column <= row
        if options.window is not None:
            mask = mask & (column > row - options.window)
    if options.plain:
        return _scaled_dot_product(
            query_HQD.unsqueeze(0),
            _per_query_head(key_KLD, heads).unsqueeze(0),
            _per_query_head(value_KLD, heads).unsqueeze(0),
            mask,
            options.scaling,
        )[0]
    grouped = query_HQD.view(kv_heads, heads // kv_heads, queries, dim).transpose(0, 1)
    out = _attend_explicitly(
        grouped.transpose(0, 1).flatten(1, 2).unsqueeze(0),
        key_KLD.unsqueeze(0),
        value_KLD.unsqueeze(0),
        mask.repeat(heads // kv_heads, 1) if mask is not None else None,
        options,
    )
    return out.view(kv_heads, heads // kv_heads, queries, -1).flatten(0, 1)


def _scaled_dot_product(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Of [..., Q, D] queries; causal where there is no mask.

    A lone bf16 row goes twice on a CPU: torch (2.13) takes five to eight times as long for one as
    for two.
    """
    rows = query.shape[-2]
    is_slow = query.dtype is torch.bfloat16 and query.device.type == "cpu"
    if rows == 1 and is_slow and mask is not None:
        query = query.expand(*query.shape[:-2], 2, -1)
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return out[..., :rows, :]


def _per_query_head(tensor_KLD: torch.Tensor, heads: int) -> torch.Tensor:
    group = heads // tensor_KLD.shape[0]
    return tensor_KLD if group == 1 else tensor_KLD.repeat_interleave(group, dim=0)


def _attend_explicitly(
    query_BKGD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention written out, with logit soft-capping (Gemma 2) and sinks (gpt-oss); softmax in
    fp32.

    The second-last dimension of ``query`` holds the group's heads, or heads times queries.
    """
    scores = torch.matmul(query_BKGD, key_BKLD.transpose(-1, -2)) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if options.sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        kv_heads, rows = scores.shape[1], scores.shape[2]
        per_head = options.sinks.view(kv_heads, -1)
        sinks = per_head.repeat_interleave(rows // per_head.shape[1], dim=1)
        column = sinks[None, :, :, None].expand(scores.shape[0], -1, -1, 1).to(scores.dtype)
        extended = torch.cat([scores, column], dim=-1)
        extended = extended - extended.max(dim=-1, keepdim=True).values
        weights = torch.softmax(extended, dim=-1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(value_BKLD.dtype), value_BKLD)
