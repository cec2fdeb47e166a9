"""The sampler against transformers' processors, against statistics, and against other batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import generation as hf

from giantserve.sampler import Sampler
from giantserve.sampling_params import SamplingParams
from giantserve.sampling_row import SamplingRow
from giantserve.token_draw import draw_tokens, filtered_probs, uniform

GREEDY = SamplingParams(temperature=0)


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def row(params: SamplingParams, seq_id: int = 0, **fields: object) -> SamplingRow:
    return SamplingRow(**{"seed": 7, "position": 3, **fields}, params=params, seq_id=seq_id)


def tokens(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return [sampled.token_id for sampled in Sampler().sample(logits, rows)]


def test_no_rows_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, 10), []) == []


def test_greedy_takes_the_first_maximum() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]])
    sampled = Sampler().sample(logits, [row(GREEDY, 4), row(GREEDY, 9)])
    assert [(s.seq_id, s.token_id, s.logprobs) for s in sampled] == [(4, 1, None), (9, 0, None)]


def test_top_k_1_is_greedy() -> None:
    logits = random_logits(8, 300)
    params = SamplingParams(top_k=1)
    rows = [row(params, seed=seed) for seed in range(8)]
    assert tokens(logits, rows) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1.1e-5, 1e-3, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    probs = filtered_probs(
        random_logits(4, 100) * 30, [SamplingParams(temperature=temperature)] * 4
    )
    assert torch.isfinite(probs).all()
    assert (probs.sum(-1) - 1).abs().max() < 1e-5


def test_adjustments_have_exact_values() -> None:
    """Ids 0..3 with logits 4, -4, 4, 4: penalised so that exactly one order of them is left."""
    logits = torch.tensor([[4.0, -4.0, 4.0, 4.0]])
    params = replace(GREEDY, logprobs=4)
    cases = [
        (replace(params, repetition_penalty=2.0), {"prompt_token_ids": [0, 2]}, 3),
        (replace(params, repetition_penalty=2.0), {"output_token_ids": [0, 3, 0]}, 2),
        (
            replace(params, presence_penalty=2.0),
            {"prompt_token_ids": [0], "output_token_ids": [2]},
            0,
        ),
        (replace(params, frequency_penalty=1.0), {"output_token_ids": [0, 0, 2, 2, 2, 3]}, 3),
        (replace(params, logit_bias={1: 8.5}), {}, 1),
        (params, {"banned_token_ids": (0, 2, 9999)}, 3),
    ]
    for chosen, fields, expected in cases:
        before = logits.clone()
        sampled = Sampler().sample(logits, [row(chosen, **fields)])[0]
        assert sampled.token_id == expected
        assert torch.equal(logits, before)
        assert sampled.logprobs is not None
        assert sampled.logprobs.chosen.logprob == pytest.approx(
            torch.log_softmax(logits, -1)[0, expected].item(), abs=1e-6
        )


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(1, 50)
    seen = [3, 3, 7, 11, 49]
    processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([seen]), logits.clone())[0]
    from giantserve.logit_adjustment import adjust_logits

    ours = logits[0].clone()
    params = SamplingParams(repetition_penalty=penalty)
    adjust_logits(ours, row(params, prompt_token_ids=seen[:2], output_token_ids=seen[2:]))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("vocab", [37, 256, 1000, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 5, 300])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_filters_equal_transformers(vocab: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(3, vocab, seed=vocab)
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    warpers = [hf.TemperatureLogitsWarper(0.7)]
    warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(min_p)] if min_p else []
    scores = logits.clone()
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)
    probs = filtered_probs(logits.clone(), [params] * 3)
    ours = probs / probs.sum(-1, keepdim=True)
    assert torch.equal(ours > 0, expected > 0)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-7)


def test_a_nucleus_wider_than_the_candidates_equals_transformers() -> None:
    """Rows of narrow and wide nuclei in one batch: only the wide ones need the whole vocabulary."""
    logits = random_logits(4, 3000) * torch.tensor([[0.1], [2.0], [0.03], [1.0]])
    expected = hf.TopPLogitsWarper(0.9)(None, logits.clone()) > -torch.inf
    kept = filtered_probs(logits.clone(), [SamplingParams(top_p=0.9)] * 4) > 0
    sizes = kept.sum(-1).tolist()
    assert sizes[0] > 256 > sizes[1]
    assert (kept != expected).sum() <= 4  # single-precision sums over 3000 tokens, either way
    limited = [SamplingParams(top_p=0.9, top_k=k) for k in (0, 0, 10, 0)]
    mixed = filtered_probs(logits.clone(), limited) > 0
    assert torch.equal(mixed[[0, 1, 3]], kept[[0, 1, 3]])
    assert mixed[2].sum() == 9


def test_tokens_tied_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    kept = filtered_probs(logits.clone(), [SamplingParams(top_k=2)])[0] > 0
    assert kept.tolist() == [True, True, True, True, False]
    # The four hold 1 and the best alone less than 0.7 of it: one tied token in, all tied ones in.
    kept = filtered_probs(logits.clone(), [SamplingParams(top_k=2, top_p=0.7)])[0] > 0
    assert kept.tolist() == [True, True, True, True, False]
    kept = filtered_probs(logits.clone(), [SamplingParams(top_k=2, top_p=0.4)])[0] > 0
    assert kept.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7, top_k=20),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.05, top_k=40, top_p=0.95),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(1, 300, seed=5) / 2
    probs = filtered_probs(logits.clone(), [params])[0].double()
    probs = probs / probs.sum()
    draws = 20_000
    counts = torch.zeros(300)
    for start in range(0, draws, 1000):
        batch = [uniform(11, position) for position in range(start, start + 1000)]
        drawn = draw_tokens(logits.repeat(1000, 1), [params] * 1000, batch)
        counts += torch.bincount(torch.tensor(drawn), minlength=300)
    assert counts[probs == 0].sum() == 0
    common = probs * draws >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    expected = [*(probs[common] * draws).tolist(), probs[~common].sum().item() * draws]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("number", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_a_token_of_no_weight_is_never_drawn(number: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 700]] = 1.0
    assert draw_tokens(logits, [SamplingParams()], [number]) == [300 if number < 0.5 else 700]


@pytest.mark.parametrize("seed", range(30))
def test_rounding_never_leaves_the_kept_tokens(seed: int) -> None:
    """Block sums in single and double precision differ; the last share still has an owner."""
    logits = random_logits(1, 250, seed)
    logits[0, 200:] = -torch.inf
    assert draw_tokens(logits, [SamplingParams()], [math.nextafter(1.0, 0.0)])[0] < 200


@pytest.mark.parametrize("exponent", range(1, 60))
def test_rounding_between_blocks(exponent: int) -> None:
    """A block so light that rounding may lose it: its first id, of weight zero, is safe."""
    logits = torch.full((1, 512), -torch.inf)
    logits[0, 0] = 0.0
    logits[0, 300] = -34.0 - exponent / 20
    assert draw_tokens(logits, [SamplingParams()], [math.nextafter(1.0, 0.0)])[0] in (0, 300)


def test_uniform_numbers_are_fixed_for_good() -> None:
    assert uniform(0, 0) == uniform(2**64, 0)
    assert uniform(0, 0) != uniform(0, 1) != uniform(1, 0)
    numbers = [uniform(3, position) for position in range(2000)]
    assert all(0 <= number < 1 for number in numbers)
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 400]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {5: 3.0}]),
    logprobs=st.sampled_from([None, 0, 3]),
)
row_strategy = st.builds(
    SamplingRow,
    params=params_strategy,
    seq_id=st.integers(0, 100),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 5000),
    prompt_token_ids=st.lists(st.integers(0, 699), max_size=5),
    output_token_ids=st.lists(st.integers(0, 699), max_size=5),
    banned_token_ids=st.lists(st.integers(0, 699), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_batch(rows: list[SamplingRow], seed: int) -> None:
    # Halves make ties, as bfloat16 heads do.
    logits = (random_logits(len(rows), 700, seed) * 2).round() / 2
    together = tokens(logits, rows)
    assert together == [tokens(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert together[::-1] == tokens(logits.flip(0), rows[::-1])


def test_seeds_and_positions_matter() -> None:
    logits = random_logits(1, 1000).repeat(50, 1) / 3
    by_seed = tokens(logits, [row(SamplingParams(), seed=seed) for seed in range(50)])
    by_position = tokens(logits, [row(SamplingParams(), position=place) for place in range(50)])
    assert len(set(by_seed)) > 25
    assert len(set(by_position)) > 25


def test_half_precision_logits_are_taken() -> None:
    logits = random_logits(2, 300).bfloat16()
    rows = [row(GREEDY), row(SamplingParams(top_p=0.5, logprobs=2))]
    assert tokens(logits, rows) == tokens(logits.float(), rows)
