"""Hundreds of requests on small pools, many given up: no answer changes, nothing is lost."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from giantserve import SamplingParams
from giantserve.async_engine import AsyncEngine
from giantserve.config import EngineConfig
from tests.exactness.plans import make_plan
from tests.exactness.zoo import make_prompts, reference

NUM_REQUESTS = 300
MAX_TOKENS = 24


@pytest.mark.parametrize("host_blocks", [24, 0])
def test_finished_answers_equal_the_reference(
    model_path: Path, options: dict[str, Any], host_blocks: int
) -> None:
    draw = random.Random(host_blocks)
    prompts = make_prompts((3, 17, 40, 9, 1, 28, 33, 12, 40, 5), seed=6)
    prompts[8][:32] = prompts[2][:32]  # a prefix shared by two that differ
    expected = reference(model_path, prompts, MAX_TOKENS)
    plan = make_plan(
        model_path, 1, 2, "mixed", device_blocks=36, host_blocks=host_blocks, max_model_len=128
    )
    config = EngineConfig(
        model=str(model_path), nvme_dir=options["nvme_dir"], block_size=plan.block_size
    )
    engine = AsyncEngine(config, plan=plan, launcher=options["launcher"])
    scheduler = engine._engine._scheduler
    aborted = 0

    async def ask(number: int) -> None:
        nonlocal aborted
        which = number % len(prompts)
        count = draw.randint(1, MAX_TOKENS)
        gives_up_after = draw.randint(1, count) if draw.random() < 0.3 else None
        params = SamplingParams(
            max_tokens=count,
            temperature=0.0,
            prompt_logprobs=1 if number % 17 == 0 else None,
        )
        await asyncio.sleep(draw.random() * 2)
        tokens: list[int] = []
        deltas = engine.generate(prompts[which], params, request_id=str(number))
        async for delta in deltas:
            tokens += delta.token_ids
            if params.prompt_logprobs is not None and delta.prompt_logprobs is not None:
                assert len(delta.prompt_logprobs) == len(prompts[which])
            if gives_up_after is not None and len(tokens) >= gives_up_after < count:
                await deltas.aclose()  # type: ignore[attr-defined]
                aborted += 1
                break
        else:
            assert len(tokens) == count
        assert tokens == expected[which][: len(tokens)]

    async def run() -> dict[str, Any]:
        await asyncio.gather(*(ask(number) for number in range(NUM_REQUESTS)))
        return await engine.stats()

    try:
        stats = asyncio.run(run())
    finally:
        asyncio.run(engine.close())
    assert stats["requests"] == NUM_REQUESTS
    # a request may end before the word that nobody waits for it gets through
    assert 20 < stats["aborted_requests"] <= aborted
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["kv"]["device_blocks_free"] == stats["kv"]["device_blocks"] == 36
    assert stats["kv"]["host_blocks_free"] == stats["kv"]["host_blocks"] == host_blocks
    assert scheduler.num_preemptions > 10, "the pools were not small enough to be felt"
    scheduler.check_integrity()
