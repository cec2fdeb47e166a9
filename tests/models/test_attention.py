"""Decode attention over block tables against attention written out, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from giantserve.models import attention
from giantserve.models.attention import AttentionOptions, attend_decodes
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
