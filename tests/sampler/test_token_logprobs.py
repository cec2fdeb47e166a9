"""Log-probabilities are those of the raw logits, for the rows that ask."""

from __future__ import annotations

import pytest
import torch

from giantserve.outputs import PositionLogprobs
from giantserve.sampler import Sampler
from giantserve.sampling_params import SamplingParams
from giantserve.sampling_row import SamplingRow


def rows_of(*params: SamplingParams) -> list[SamplingRow]:
    return [SamplingRow(params=p, seq_id=i, seed=i, position=0) for i, p in enumerate(params)]


def check(entry: PositionLogprobs, logits: torch.Tensor, token_id: int, k: int) -> None:
    expected = logits.log_softmax(-1)
    assert entry.chosen.token_id == token_id
    assert entry.chosen.logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
    assert entry.chosen.rank == int((logits > logits[token_id]).sum()) + 1
    best = expected.topk(k)
    assert [top.token_id for top in entry.top] == best.indices.tolist()
    assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [top.rank for top in entry.top] == list(range(1, k + 1))


def test_only_rows_that_ask_get_them_under_raw_logits() -> None:
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    biased = SamplingParams(temperature=0, logprobs=5, logit_bias={17: 100})
    sampled = Sampler().sample(
        logits,
        rows_of(
            SamplingParams(temperature=0),
            biased,
            SamplingParams(temperature=1.9, logprobs=0),
            SamplingParams(top_k=3),
        ),
    )
    assert sampled[0].logprobs is None
    assert sampled[3].logprobs is None
    assert sampled[1].token_id == 17
    assert sampled[1].logprobs is not None
    assert sampled[2].logprobs is not None
    check(sampled[1].logprobs, logits[1], 17, 5)
    check(sampled[2].logprobs, logits[2], sampled[2].token_id, 0)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 70])
def test_prompt_logprobs(count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(count, 90, generator=generator)
    following = torch.randint(90, (count,), generator=generator).tolist()
    entries = Sampler().prompt_logprobs(logits, following, 4)
    assert len(entries) == count
    for entry, row, token_id in zip(entries, logits, following, strict=True):
        check(entry, row, token_id, 4)


def test_more_alternatives_than_tokens() -> None:
    entry = Sampler().prompt_logprobs(torch.tensor([[1.0, 3.0, 2.0]]), [2], 20)[0]
    assert [top.token_id for top in entry.top] == [1, 2, 0]
    assert entry.chosen.rank == 2
