"""The engine under asyncio: the same tokens, one wake-up of the loop a pass, aborts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zoo import make_prompts, reference, save_model

from giantserve.async_engine import AsyncEngine
from giantserve.config import EngineConfig
from giantserve.errors import InvalidRequestError
from giantserve.executor.launcher import Launcher
from giantserve.sampling_params import SamplingParams

PROMPTS = make_prompts()
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine(tmp_path: Path, launcher: Launcher) -> AsyncEngine:
    config = EngineConfig(
        model=str(save_model("llama", tmp_path)),
        device_memory=64 << 20,
        host_memory=8 << 20,
    )
    return AsyncEngine(config, launcher=launcher)


async def collect(engine: AsyncEngine, name: str, prompt: list[int]) -> list[int]:
    deltas = engine.generate(prompt, GREEDY, request_id=name)
    return [token async for delta in deltas for token in delta.token_ids]


async def test_a_pass_wakes_the_loop_once(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    wake_ups: list[Callable[..., object]] = []
    real = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *args: Any, **options: Any) -> Any:
        wake_ups.append(callback)
        return real(callback, *args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    asking = (collect(engine, f"r{i}", prompt) for i, prompt in enumerate(PROMPTS))
    tokens = await asyncio.gather(*asking)
    during = len(wake_ups)
    stats = await engine.stats()
    await engine.close()
    assert tokens == reference(Path(engine.config.model), PROMPTS, 16)
    assert stats["generated_tokens"] == 16 * len(PROMPTS)
    assert during <= stats["passes"] < stats["generated_tokens"] / 2


async def test_closing_a_stream_aborts_it_and_no_other(engine: AsyncEngine) -> None:
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    stream = engine.generate(PROMPTS[0], long, request_id="long")
    await anext(aiter(stream))
    other = asyncio.create_task(collect(engine, "other", PROMPTS[1]))
    await stream.aclose()  # type: ignore[attr-defined]
    expected = reference(Path(engine.config.model), [PROMPTS[1]], 16)
    assert await other == expected[0]
    stats = await engine.stats()
    assert stats["aborted_requests"] == 1 and stats["running"] == 0
    assert stats["kv"]["device_blocks_free"] == stats["kv"]["device_blocks"]
    await engine.close()


async def test_a_refusal_reaches_its_caller_alone(engine: AsyncEngine) -> None:
    with pytest.raises(InvalidRequestError):
        await collect(engine, "bad", [10**6])
    expected = reference(Path(engine.config.model), [PROMPTS[0]], 16)
    assert await collect(engine, "good", PROMPTS[0]) == expected[0]
    await engine.close()
