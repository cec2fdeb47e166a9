"""How tokens are chosen and scored, held to transformers' own logits and processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from giantserve import LLM, SamplingParams
from tests.exactness.zoo import make_prompts

PROMPTS = make_prompts((5, 21, 40))


@torch.inference_mode()
def greedy_by_hand(oracle: Any, prompt: list[int], count: int, adjust: Any) -> list[int]:
    """transformers' logits, ``adjust(ids [1, T], output ids, logits [1, V])``, the best token."""
    output: list[int] = []
    for _ in range(count):
        ids = torch.tensor([prompt + output])
        logits = oracle(ids).logits[:, -1].clone()
        output.append(int(adjust(ids, output, logits).argmax()))
    return output


def test_logprobs_are_those_of_transformers(llm: LLM, oracle: Any) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.7, seed=3, logprobs=4, prompt_logprobs=2)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + output.token_ids])).logits[0]
        logprobs = logits.float().log_softmax(-1)
        assert output.logprobs is not None and output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        assert len(output.logprobs) == 12
        entries = [*output.prompt_logprobs[1:], *output.logprobs]
        tokens = [*prompt[1:], *output.token_ids]
        for place, (entry, token) in enumerate(zip(entries, tokens, strict=True)):
            row = logprobs[place]
            assert entry is not None and entry.chosen.token_id == token
            assert entry.chosen.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert entry.chosen.rank == int((row > row[token]).sum()) + 1
            best = row.topk(2 if place < len(prompt) - 1 else 4)
            assert [top.token_id for top in entry.top] == best.indices.tolist()
            assert [top.logprob for top in entry.top] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )


def test_repetition_penalty(llm: LLM, oracle: Any) -> None:
    process = RepetitionPenaltyLogitsProcessor(1.8)
    params = SamplingParams(max_tokens=20, temperature=0.0, repetition_penalty=1.8)
    outputs = llm.generate(PROMPTS, params)
    plain = llm.generate(PROMPTS, SamplingParams(max_tokens=20, temperature=0.0))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = greedy_by_hand(oracle, prompt, 20, lambda ids, _, logits: process(ids, logits))
        assert output.token_ids == expected
    assert [o.token_ids for o in outputs] != [o.token_ids for o in plain], "nothing was felt"


def test_logit_bias(llm: LLM, oracle: Any) -> None:
    likely = llm.generate(PROMPTS[0], SamplingParams(max_tokens=20, temperature=0.0))[0].token_ids
    bias = {likely[0]: -100.0, likely[1]: -5.0, 17: 3.5}
    process = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    params = SamplingParams(max_tokens=20, temperature=0.0, logit_bias=bias)
    output = llm.generate(PROMPTS[0], params)[0]
    assert output.token_ids == greedy_by_hand(
        oracle, PROMPTS[0], 20, lambda ids, _, logits: process(ids, logits)
    )
    assert likely[0] not in output.token_ids


def test_presence_and_frequency_penalties(llm: LLM, oracle: Any) -> None:
    def adjust(ids: torch.Tensor, output: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token in set(output):
            logits[0, token] -= 0.6 + 0.9 * output.count(token)
        return logits

    params = SamplingParams(
        max_tokens=30, temperature=0.0, presence_penalty=0.6, frequency_penalty=0.9
    )
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert output.token_ids == greedy_by_hand(oracle, prompt, 30, adjust)


def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(llm: LLM) -> None:
    seeded = SamplingParams(max_tokens=24, temperature=1.3, top_p=0.95, min_p=0.01, seed=11)
    alone = llm.generate(PROMPTS[1], seeded)[0].token_ids
    assert llm.generate(PROMPTS[1], seeded)[0].token_ids == alone
    others = make_prompts((9, 30, 2, 17, 51, 8, 12, 40, 3), seed=5)
    noise = [SamplingParams(max_tokens=10 + i, temperature=1.0) for i in range(len(others))]
    outputs = llm.generate([*others[:4], PROMPTS[1], *others[4:]], [*noise[:4], seeded, *noise[4:]])
    assert outputs[4].token_ids == alone
    other_seed = SamplingParams(max_tokens=24, temperature=1.3, top_p=0.95, min_p=0.01, seed=12)
    assert llm.generate(PROMPTS[1], other_seed)[0].token_ids != alone


def test_n_choices_of_a_seed_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.2, seed=4, n=4)
    first = [choice.token_ids for choice in llm.generate(PROMPTS[0], params)[0].choices]
    again = [choice.token_ids for choice in llm.generate(PROMPTS[0], params)[0].choices]
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 4


def test_without_a_seed_runs_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.5)
    runs = {tuple(llm.generate(PROMPTS[0], params)[0].token_ids) for _ in range(3)}
    assert len(runs) == 3


def test_top_k_of_one_is_greedy(llm: LLM) -> None:
    greedy = llm.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0.0))
    top = llm.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=2.0, top_k=1))
    assert [o.token_ids for o in top] == [o.token_ids for o in greedy]
