"""Shards that are stopped, not killed: health checks tell, and closing does not wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deployments import health_probe
from deployments.health_probe import HealthProbe
from giantserve import async_engine
from giantserve import engine as engine_module
from giantserve.async_engine import AsyncEngine
from giantserve.config import EngineConfig
from giantserve.engine import Engine
from giantserve.errors import EngineDeadError
from giantserve.executor import base, local
from giantserve.executor.launcher import Launcher
from tests.faults.conftest import GREEDY, PROMPTS

TIMEOUT_S = 1.0
PATIENCE_S = 30.0
"""Until a test gives up: far longer than what it waits for takes."""


@pytest.fixture
def config(pristine: Path, disk: Path) -> EngineConfig:
    return EngineConfig(
        model=str(pristine),
        nvme_dir=disk,
        max_model_len=96,
        max_num_seqs=2,
        max_queued_requests=2,
        tensor_parallel=1,
        pipeline_parallel=1,
        device_memory=64 << 20,
        host_memory=8 << 20,
        allow_unused_tiers=True,
    )


@contextlib.contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """Its only worker does nothing meanwhile."""
    (pid,) = engine._executor.worker_pids  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def failed_checks(probe: HealthProbe) -> int:
    """How many of three checks in a row fail."""
    failed = 0
    for _ in range(3):
        try:
            await probe.check()
        except EngineDeadError as error:
            assert "no layer began within 1 s" in str(error)
            failed += 1
        await asyncio.sleep(0.02)
    return failed


async def until(holds: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up_s
        await asyncio.sleep(0.01)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "STALL_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(async_engine, "STALL_CHECK_PERIOD_S", 0.05)
    monkeypatch.setattr(health_probe, "TOKEN_PERIOD_S", 0.5)


def test_checks_fail_in_a_row_until_a_token_comes(
    config: EngineConfig, launcher: Launcher, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncEngine(config, launcher=launcher)

    async def check() -> None:
        await engine.wait_until_loaded()
        probe = HealthProbe(engine)
        assert await failed_checks(probe) == 0
        with stopped(engine._engine):
            failed = 0
            give_up_s = time.monotonic() + PATIENCE_S
            while not failed:  # a token that is due, and not made
                assert time.monotonic() < give_up_s
                failed = await failed_checks(probe)
            assert await failed_checks(probe) == 3
        await until(lambda: engine._engine.stalled_s == 0)
        monkeypatch.setattr(health_probe, "TOKEN_PERIOD_S", 600.0)
        give_up_s = time.monotonic() + PATIENCE_S
        while await failed_checks(probe):
            assert time.monotonic() < give_up_s
        assert await failed_checks(probe) == 0
        probe.close()
        await engine.close()

    asyncio.run(check())


def test_a_full_queue_hides_no_stall(
    config: EngineConfig, launcher: Launcher, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "STALL_CHECK_PERIOD_S", PATIENCE_S)
    engine = AsyncEngine(config, launcher=launcher)

    async def check() -> None:
        await engine.wait_until_loaded()
        with stopped(engine._engine):
            for number in range(3):  # one in a pass and two that wait
                engine._engine.submit(str(number), PROMPTS[0], GREEDY, lambda item: None)
                await until(lambda: engine._engine._in_flight == 1)
            begun_s = time.monotonic()
            await engine.check_health()
            assert time.monotonic() - begun_s < PATIENCE_S / 2, "the queue was not full"
            await until(lambda: engine._engine.stalled_s > TIMEOUT_S)
            with pytest.raises(EngineDeadError, match="no layer began within"):
                await engine.check_health()
        await engine.close()

    asyncio.run(check())


def close_s(engine: Engine, busy: bool) -> float:
    """How long it takes to close while its worker is stopped, ``busy``: in a pass."""
    closing = threading.Thread(target=engine.close)
    engine.stats()  # from now on the last pass has told the shard what to drop
    while engine._in_flight:
        time.sleep(0.01)
    with stopped(engine):
        if busy:
            engine.submit("hung", PROMPTS[1], GREEDY, lambda item: None)
            while not engine._in_flight:
                time.sleep(0.01)
        begun_s = time.monotonic()
        closing.start()
        closing.join(PATIENCE_S)
        took_s = time.monotonic() - begun_s
    closing.join()
    return took_s


@pytest.mark.parametrize("busy", [True, False])
def test_closing_does_not_wait_for_prefixes_of_a_hung_shard(
    config: EngineConfig, launcher: Launcher, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(engine_module, "CLOSE_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(base, "KEEP_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(local, "STOP_TIMEOUT_S", TIMEOUT_S)
    engine = Engine(replace(config, prefix_memory=8 << 20), launcher=launcher)
    engine.wait_until_loaded()
    items: queue.SimpleQueue[object] = queue.SimpleQueue()
    engine.submit("first", PROMPTS[0], GREEDY, items.put)
    while getattr(items.get(timeout=PATIENCE_S), "usage", None) is None:
        continue
    assert close_s(engine, busy) < PATIENCE_S
    said = "no shard got on within 1 s" if busy else "did not get on with keeping KV for 1 s"
    assert said in str(engine.failure)


def test_closing_does_not_wait_for_the_trace_of_a_hung_shard(
    config: EngineConfig, launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "SPANS_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(local, "STOP_TIMEOUT_S", TIMEOUT_S)
    engine = Engine(replace(config, trace=tmp_path / "trace.json"), launcher=launcher)
    engine.wait_until_loaded()
    assert close_s(engine, busy=False) < PATIENCE_S
    assert engine._executor.spans == {}
    assert (tmp_path / "trace.json").exists()


def test_closing_after_the_launcher_was_killed(config: EngineConfig) -> None:
    launcher = Launcher()
    engine = Engine(config, launcher=launcher)
    engine.wait_until_loaded()
    (pid,) = engine._executor.worker_pids  # type: ignore[attr-defined]
    worker = psutil.Process(pid)
    connections = list(engine._executor._connections.values())
    assert launcher._process is not None
    launcher._process.kill()
    engine.close()
    launcher.close()
    assert all(connection.closed for connection in connections)
    give_up_s = time.monotonic() + PATIENCE_S
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < give_up_s, "the worker outlives its engine"
        time.sleep(0.01)
