"""What requests draw that bring no seed of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from giantserve import LLM, SamplingParams

DRAWN = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
PROMPT = [5, 6, 7]


def draw(
    model_path: Path, options: dict[str, Any], seed: int | None, *, greedy_first: bool = False
) -> list[list[int]]:
    with LLM(model_path, **options, seed=seed) as llm:
        if greedy_first:
            llm.generate([PROMPT], GREEDY)
        return [output.token_ids for output in llm.generate([PROMPT] * 3, DRAWN)]


def test_a_seed_of_the_engine_fixes_what_its_requests_draw_in_turn(
    model_path: Path, options: dict[str, Any]
) -> None:
    first = draw(model_path, options, 7)
    assert len({tuple(tokens) for tokens in first}) == 3
    # what draws nothing, such as the token of a health check, changes nothing
    assert draw(model_path, options, 7, greedy_first=True) == first
    assert draw(model_path, options, 8) != first


def test_without_one_every_start_draws_others(model_path: Path, options: dict[str, Any]) -> None:
    assert draw(model_path, options, None) != draw(model_path, options, None)
