"""The sequences of one pass as tensors: where each token's KV goes and what each query may see."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """Consecutive tokens of one sequence: rows [row, row + length) of the pass, positions from
    ``start``.

    ``table`` [N] int64 are its blocks, as the views that come with the batch count them: device
    blocks, slots of the rotation or rows on the host. ``whole``: the tokens of the prompt that the
    chunk is to be attended to as a part of, to the bit; None: in whatever way is fast.
    """

    seq_id: int
    row: int
    start: int
    length: int
    table: torch.Tensor
    whole: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one token each and contexts of similar length.

    ``rows`` [B] of the pass, ``tables`` [B, N] block ids (padded with block 0), ``lengths`` [B]
    context lengths, the new token included.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTables:
    """All B sequences of a pass in row order, int32: ``blocks`` [B, N] padded with block 0,
    ``query_starts`` [B + 1] rows, ``contexts`` [B] lengths with the pass's tokens included."""

    blocks: torch.Tensor
    query_starts: torch.Tensor
    contexts: torch.Tensor
    longest_query: int
    longest_context: int


@dataclass(slots=True, kw_only=True)
class PassBatch:
    """The tokens of a pass, or some of them. ``block_ids`` and ``offsets`` [T] say where each
    token's KV goes, in the order of ``specs``.

    ``gathered``: keys and values reach the attention as whole contexts (see `GatheringCache`).
    """

    block_size: int
    positions: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    prompts: list[PromptChunk] = field(default_factory=list)
    decodes: list[DecodeGroup] = field(default_factory=list)
    chunks: list[PromptChunk] = field(default_factory=list)
    gathered: bool = False
    specs: tuple[ChunkSpec, ...] = ()
    _tables: BlockTables | None = None

    @property
    def tables(self) -> BlockTables:
        """The pass as one kernel wants it; built at the first layer that asks."""
        if self._tables is None:
            self._tables = _block_tables(self.specs, self.block_size, self.positions.device)
        return self._tables

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    def all_chunks(self) -> list[PromptChunk]:
        """Every sequence of the pass in row order, decodes as chunks of one token."""
        return self.chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpec:
    """What `build_batch` needs of one sequence. ``whole``: see `PromptChunk`."""

    seq_id: int
    start: int
    length: int
    block_ids: Sequence[int]
    whole: int | None = None


MAX_PADDING = 0.25
"""Decodes share a group while padding to the longest context adds at most this share of blocks."""


def build_batch(
    specs: Sequence[ChunkSpec],
    block_size: int,
    device: torch.device,
    *,
    gathered: bool = False,
    first_rows: Sequence[int] | None = None,
) -> PassBatch:
    """Lay the chunks one after the other, in the order given; or each from its row of
    ``first_rows`` on."""
    positions: list[int] = []
    block_ids: list[int] = []
    chunks: list[PromptChunk] = []
    prompts: list[PromptChunk] = []
    decodes: list[tuple[int, int, ChunkSpec]] = []
    for index, spec in enumerate(specs):
        row = len(positions) if first_rows is None else first_rows[index]
        span = range(spec.start, spec.start + spec.length)
        positions.extend(span)
        block_ids.extend(spec.block_ids[position // block_size] for position in span)
        is_decode = spec.length == 1 and spec.whole is None
        if gathered or not is_decode:
            used = spec.block_ids[: -(-span.stop // block_size)]
            chunk = PromptChunk(
                seq_id=spec.seq_id,
                row=row,
                start=spec.start,
                length=spec.length,
                table=torch.tensor(used, device=device),
                whole=spec.whole,
            )
            chunks.append(chunk)
            if not is_decode:
                prompts.append(chunk)
        if is_decode:
            decodes.append((-(-span.stop // block_size), row, spec))
    where = torch.tensor([positions, block_ids], dtype=torch.long, device=device)
    return PassBatch(
        block_size=block_size,
        positions=where[0],
        block_ids=where[1],
        offsets=where[0] % block_size,
        prompts=prompts,
        decodes=_group_decodes(decodes, device),
        chunks=chunks,
        gathered=gathered,
        specs=tuple(specs),
    )


def _block_tables(specs: Sequence[ChunkSpec], block_size: int, device: torch.device) -> BlockTables:
    contexts = [spec.start + spec.length for spec in specs]
    used = [-(-context // block_size) for context in contexts]
    starts = [0, *itertools.accumulate(spec.length for spec in specs)]
    blocks = [
        [*spec.block_ids[:count], *[0] * (max(used) - count)]
        for spec, count in zip(specs, used, strict=True)
    ]
    return BlockTables(
        blocks=torch.tensor(blocks, dtype=torch.int32, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        contexts=torch.tensor(contexts, dtype=torch.int32, device=device),
        longest_query=max(spec.length for spec in specs),
        longest_context=max(contexts),
    )


def _group_decodes(
    decodes: list[tuple[int, int, ChunkSpec]], device: torch.device
) -> list[DecodeGroup]:
    groups: list[DecodeGroup] = []
    ordered = sorted(decodes, key=lambda item: -item[0])
    while ordered:
        longest = ordered[0][0]
        used = size = 0
        for num_blocks, _, _ in ordered:
            if longest * (size + 1) > (used + num_blocks) * (1 + MAX_PADDING):
                break
            used, size = used + num_blocks, size + 1
        members, ordered = ordered[:size], ordered[size:]
        tables = [
            [*spec.block_ids[:num_blocks], *[0] * (longest - num_blocks)]
            for num_blocks, _, spec in members
        ]
        groups.append(
            DecodeGroup(
                rows=torch.tensor([row for _, row, _ in members], device=device),
                tables=torch.tensor(tables, device=device),
                lengths=torch.tensor([spec.start + 1 for _, _, spec in members], device=device),
            )
        )
    return groups
