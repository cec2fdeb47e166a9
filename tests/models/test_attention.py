"""Decode attention over block tables against attention written out, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from giantserve.models import attention
from giantserve.models.attention import (
    AttentionOptions,
    attend,
    attend_decodes,
    attend_decodes_exactly,
)
from giantserve.models.batch import DecodeGroup

BLOCKS, BLOCK_SIZE, DIM = 40, 4, 8


def written_out(
    query_HD: torch.Tensor, keys_LKD: torch.Tensor, values_LKD: torch.Tensor, o: AttentionOptions
) -> torch.Tensor:
    heads, kv_heads = query_HD.shape[0], keys_LKD.shape[1]
    first = 0 if o.window is None else max(0, keys_LKD.shape[0] - o.window)
    out = []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = keys_LKD[first:, kv_head] @ query_HD[head] * o.scaling
        if o.softcap is not None:
            scores = o.softcap * torch.tanh(scores / o.softcap)
        if o.sinks is not None:
            scores = torch.cat([scores, o.sinks[head : head + 1]])
        weights = torch.softmax(scores, 0)[: keys_LKD.shape[0] - first]
        out.append(weights @ values_LKD[first:, kv_head])
    return torch.stack(out)


@pytest.mark.parametrize("cached_sequences", [1, 2, 100])
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks"])
def test_decodes_are_attended_to_in_parts_that_fit_the_caches(
    kind: str, heads: int, kv_heads: int, cached_sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [13, 16, 9, 11, 16]
    options = AttentionOptions(
        scaling=0.3,
        window=5 if kind == "window" else None,
        softcap=2.0 if kind == "softcap" else None,
        sinks=torch.randn(heads, generator=generator) if kind == "sinks" else None,
    )
    keys, values = torch.randn(2, BLOCKS, BLOCK_SIZE, kv_heads, DIM, generator=generator)
    tables = torch.randperm(BLOCKS, generator=generator)[:20].view(5, 4)
    query = torch.randn(5, heads, DIM, generator=generator)
    group = DecodeGroup(rows=torch.arange(5), tables=tables, lengths=torch.tensor(lengths))
    of_one = tables.shape[1] * keys[0].nbytes
    monkeypatch.setattr(attention, "CACHED_BYTES", cached_sequences * of_one)
    found = attend_decodes(query, keys, values, group, options)
    for index, length in enumerate(lengths):
        whole = (each[tables[index]].flatten(0, 1)[:length] for each in (keys, values))
        torch.testing.assert_close(found[index], written_out(query[index], *whole, options))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_lone_bf16_row_is_what_it_is_by_itself(kv_heads: int) -> None:
    """One query head a KV head goes through torch's product as two rows."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, BLOCKS, BLOCK_SIZE, kv_heads, 64, generator=generator)
    keys, values = drawn.to(torch.bfloat16)
    tables = torch.randperm(BLOCKS, generator=generator).view(4, 10)
    lengths = torch.tensor([40, 33, 7, 1])
    query = torch.randn(4, kv_heads, 64, generator=generator).to(torch.bfloat16)
    group = DecodeGroup(rows=torch.arange(4), tables=tables, lengths=lengths)
    options = AttentionOptions(scaling=0.125, window=None, softcap=None, sinks=None)
    found = attend_decodes(query, keys, values, group, options)
    whole = [each[tables].flatten(1, 2).transpose(1, 2) for each in (keys, values)]
    visible = torch.arange(40) < lengths[:, None]
    alone = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], *whole, attn_mask=visible[:, None, None], scale=0.125
    )
    torch.testing.assert_close(found, alone[:, :, 0], rtol=0, atol=4e-3)
    last = attend(query[:1].transpose(0, 1), whole[0][0], whole[1][0], options, query_start=39)
    torch.testing.assert_close(last[:, 0], alone[0, :, 0], rtol=0, atol=4e-3)


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (8, 2)])
def test_exact_decodes_have_the_bits_of_contexts_by_themselves(
    heads: int, kv_heads: int, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, BLOCKS, BLOCK_SIZE, kv_heads, 64, generator=generator)
    keys, values = drawn.to(torch.bfloat16)
    tables = torch.randperm(BLOCKS, generator=generator).view(4, 10)
    lengths = [40, 33, 7, 33]
    query = torch.randn(4, heads, 64, generator=generator).to(torch.bfloat16)
    group = DecodeGroup(rows=torch.arange(4), tables=tables, lengths=torch.tensor(lengths))
    options = AttentionOptions(scaling=0.125, window=window, softcap=None, sinks=None)
    found = attend_decodes_exactly(query, keys, values, group, options)
    for index, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        key, value = (
            each[tables[index]].flatten(0, 1)[first:length].transpose(0, 1)[None]
            for each in (keys, values)
        )
        alone = torch.nn.functional.scaled_dot_product_attention(
            query[index, :, None][None], key, value, scale=0.125, enable_gqa=True
        )
        assert torch.equal(found[index], alone[0, :, 0])
