"""What ends a sequence, and what is in its output then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from giantserve import LLM, SamplingParams
from giantserve.outputs import FinishReason
from giantserve.tokenizer import Tokenizer
from tests.llm.conftest import with_end_token

PROMPT = "def read(self):"


def greedy(llm: LLM, **fields: Any) -> Any:
    fields = {"max_tokens": 40, "temperature": 0.0, **fields}
    return llm.generate(PROMPT, SamplingParams(**fields))[0]


def test_max_tokens_ends_by_length(llm: LLM, tokenizer: Tokenizer) -> None:
    output = greedy(llm)
    assert len(output.token_ids) == 40
    assert output.finish_reason == FinishReason.LENGTH
    assert output.text == tokenizer.decode(output.token_ids)
    assert output.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert output.usage.completion_tokens == 40


def test_the_context_ends_by_length(llm: LLM) -> None:
    prompt = [7] * (llm.max_model_len - 3)
    output = llm.generate(prompt, SamplingParams(max_tokens=50, temperature=0.0))[0]
    assert len(output.token_ids) == 3
    assert output.finish_reason == FinishReason.LENGTH


def test_stop_string_is_cut_off_or_kept(llm: LLM) -> None:
    text = greedy(llm).text
    stop = text[len(text) // 2 :][:3]
    place = text.index(stop)
    cut = greedy(llm, stop=(stop,))
    assert (cut.text, cut.finish_reason) == (text[:place], FinishReason.STOP)
    assert cut.choices[0].stop_reason == stop
    kept = greedy(llm, stop=(stop,), include_stop_str_in_output=True)
    assert kept.text == text[: place + len(stop)]


def test_stop_token_ends_the_sequence(llm: LLM) -> None:
    tokens = greedy(llm).token_ids
    stop = tokens[20]
    place = tokens.index(stop)
    output = greedy(llm, stop_token_ids=(stop,))
    assert output.token_ids == tokens[: place + 1]
    assert output.finish_reason == FinishReason.STOP
    assert output.choices[0].stop_reason == stop


@torch.inference_mode()
def test_min_tokens_bar_stop_tokens(llm: LLM, oracle: Any, tokenizer: Tokenizer) -> None:
    stop = greedy(llm).token_ids[2]
    ids = tokenizer.encode(PROMPT)
    expected: list[int] = []
    while len(expected) < 40 and not (len(expected) >= 12 and expected[-1] == stop):
        logits = oracle(torch.tensor([ids + expected])).logits[0, -1]
        if len(expected) < 12:
            logits[stop] = -torch.inf
        expected.append(int(logits.argmax()))
    output = greedy(llm, stop_token_ids=(stop,), min_tokens=12)
    assert output.token_ids == expected
    assert stop not in output.token_ids[:12]


def test_end_token_and_ignore_eos(
    llm: LLM, model_path: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    tokens = greedy(llm).token_ids
    end = tokens[5]
    place = tokens.index(end)
    with LLM(with_end_token(model_path, tmp_path / "ends", end), **options) as ending:
        output = greedy(ending)
        assert output.token_ids == tokens[: place + 1]
        assert output.finish_reason == FinishReason.STOP
        assert output.choices[0].stop_reason is None
        assert greedy(ending, ignore_eos=True).token_ids == tokens


@pytest.mark.parametrize("count", [1, 3])
def test_n_greedy_choices_are_the_same(llm: LLM, count: int) -> None:
    output = greedy(llm, n=count)
    assert [choice.index for choice in output.choices] == list(range(count))
    assert all(choice.token_ids == output.token_ids for choice in output.choices)
    assert output.usage.completion_tokens == 40 * count
