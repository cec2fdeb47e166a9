"""Requests are served while weights load from a disk that takes its time, and a load that fails
says so to whoever waits."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from giantserve import LLM, SamplingParams
from giantserve import async_engine as async_engine_module
from giantserve.async_engine import AsyncEngine
from giantserve.config import EngineConfig
from giantserve.engine import Engine
from giantserve.errors import CheckpointError, EngineDeadError, GiantserveError
from giantserve.executor.launcher import Launcher
from giantserve.executor.messages import LoadProgress
from giantserve.outputs import StreamDelta
from tests.exactness.zoo import reference, save_twelve_layers
from tests.faults.loop_disk import mounted_disk

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from throttle import Throttle

LOAD_S = 4.0
PROMPT = [3, 14, 15, 92, 65]
NUM_TOKENS = 6
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
DISK_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class SlowModel:
    """A model that takes `LOAD_S` to read for the workers that ``launcher`` forks."""

    path: Path
    launcher: Launcher

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def config(self, dtype: str = "auto") -> EngineConfig:
        return EngineConfig(model=str(self.path), max_model_len=64, max_num_seqs=2, dtype=dtype)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """24 MiB in 12 layers, on a disk of its own: what else a worker reads is not slow."""
    with mounted_disk(tmp_path_factory.mktemp("slow"), DISK_BYTES) as disk:
        yield save_twelve_layers(disk.folder / "model")


@pytest.fixture
def slow(path: Path) -> Iterator[SlowModel]:
    """Skips, with the reason, where disks cannot be throttled."""
    model = SlowModel(path, Launcher())
    try:
        LLM(path, max_model_len=64, max_num_seqs=2, launcher=model.launcher).close()  # calibrates
        assert model.launcher._process is not None
        content = model.weights.read_bytes()
        forget(model.weights)
        rate = len(content) / LOAD_S
        try:
            throttle = Throttle("load", model.launcher._process.pid, path, rate)
        except OSError as error:
            pytest.skip(f"disks cannot be throttled here: {error}")
        with throttle:
            yield model
            model.launcher.close()
        model.weights.write_bytes(content)
    finally:
        model.launcher.close()


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_requests_are_served_while_weights_load(slow: SlowModel, dtype: str) -> None:
    items: queue.SimpleQueue[StreamDelta | GiantserveError] = queue.SimpleQueue()
    seen: list[tuple[int, int]] = []

    def on_progress(rank: int, progress: LoadProgress) -> None:
        seen.append((progress.done_bytes, progress.total_bytes))

    engine = Engine(slow.config(dtype), launcher=slow.launcher, on_progress=on_progress)
    try:
        loaded = threading.Event()
        threading.Thread(target=lambda: (engine.wait_until_loaded(), loaded.set())).start()
        started_s = time.monotonic()
        assert seen and seen[-1][0] < seen[-1][1] / 2
        engine.submit("early", PROMPT, GREEDY, items.put)
        stats = engine.stats()
        assert stats["running"] == 1 and not loaded.is_set()  # answered beside the pass
        tokens: list[int] = []
        while not isinstance(item := items.get(timeout=120), GiantserveError):
            tokens += item.token_ids
            if len(tokens) == 1:
                first_s = time.monotonic() - started_s
            if item.usage is not None:
                break
        if dtype == "float32":
            assert [tokens] == reference(slow.path, [PROMPT], NUM_TOKENS)
        assert loaded.wait(30)
        assert first_s > LOAD_S / 4, "the disk was not slow"
        assert seen[-1][0] == seen[-1][1]
        assert seen == sorted(seen)
        (shard,) = engine.stats()["shards"]
        assert shard["stall_s"] > LOAD_S / 4
        engine.submit("late", PROMPT, GREEDY, items.put)
        late: list[int] = []
        while len(late) < NUM_TOKENS:
            item = items.get(timeout=60)
            assert isinstance(item, StreamDelta)
            late += item.token_ids
        assert late == tokens
    finally:
        engine.close()


def test_a_replica_that_loads_is_well_and_one_that_hangs_is_not(
    slow: SlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine_module, "STALL_TIMEOUT_S", LOAD_S / 2)
    monkeypatch.setattr(async_engine_module, "STALL_CHECK_PERIOD_S", 0.05)
    engine = AsyncEngine(slow.config(), launcher=slow.launcher)

    async def check() -> None:
        begun_s = time.monotonic()
        await engine.check_health()
        assert time.monotonic() - begun_s > LOAD_S / 4, "the disk was not slow"
        await engine.wait_until_loaded()
        (pid,) = engine._engine._executor.worker_pids  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineDeadError, match="no layer began within"):
                await engine.check_health()
        finally:
            os.kill(pid, signal.SIGCONT)
        while engine._engine.stalled_s > 0:
            await asyncio.sleep(0.01)
        await engine.check_health()
        await engine.close()

    asyncio.run(check())


def test_a_unit_that_takes_long_to_load_is_no_stall(
    slow: SlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is stopped in the load, as it is while a disk takes its time for a unit."""
    monkeypatch.setattr(async_engine_module, "STALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(async_engine_module, "STALL_CHECK_PERIOD_S", 0.05)
    engine = AsyncEngine(slow.config(), launcher=slow.launcher)
    (pid,) = engine._engine._executor.worker_pids  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGSTOP)

    async def check() -> None:
        health = asyncio.ensure_future(engine.check_health())
        await asyncio.sleep(1.5)
        assert not health.done() and not engine._engine.is_loaded
        monkeypatch.setattr(async_engine_module, "LOAD_STALL_TIMEOUT_S", 1.0)
        with pytest.raises(EngineDeadError, match="no layer began within 1 s"):
            await health  # unless it takes too long
        health = asyncio.ensure_future(engine.check_health())
        monkeypatch.setattr(async_engine_module, "LOAD_STALL_TIMEOUT_S", 60.0)
        os.kill(pid, signal.SIGCONT)
        await engine.wait_until_loaded()
        monkeypatch.setattr(async_engine_module, "STALL_TIMEOUT_S", 60.0)
        await health
        await engine.close()

    asyncio.run(check())


def test_a_checkpoint_cut_during_the_load_ends_the_engine(slow: SlowModel) -> None:
    items: queue.SimpleQueue[StreamDelta | GiantserveError] = queue.SimpleQueue()
    engine = Engine(slow.config(), launcher=slow.launcher)
    try:
        engine.submit("early", PROMPT, GREEDY, items.put)
        os.truncate(slow.weights, slow.weights.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="was cut since it was opened"):
            engine.wait_until_loaded()
        error = items.get(timeout=30)
        assert isinstance(error, EngineDeadError) and "was cut" in str(error)
        with pytest.raises(EngineDeadError, match="was cut"):
            engine.submit("late", PROMPT, GREEDY, items.put)
        with pytest.raises(EngineDeadError, match="was cut"):
            engine.stats()
    finally:
        engine.close()


def test_a_shard_killed_during_the_load_fails_the_constructor(slow: SlowModel) -> None:
    assert slow.launcher._process is not None
    launcher = psutil.Process(slow.launcher._process.pid)

    def kill(rank: int, progress: LoadProgress) -> None:
        for worker in launcher.children():
            worker.kill()

    with pytest.raises(EngineDeadError, match=r"shard 0 died: its process ended with signal 9"):
        LLM(
            slow.path,
            max_model_len=64,
            max_num_seqs=2,
            launcher=slow.launcher,
            on_progress=kill,
        )
    assert not launcher.children()


def test_closing_during_the_load_does_not_wait_for_it(slow: SlowModel) -> None:
    engine = Engine(slow.config(), launcher=slow.launcher)
    (pid,) = engine._executor.worker_pids  # type: ignore[attr-defined]
    begun_s = time.monotonic()
    engine.close()
    assert time.monotonic() - begun_s < LOAD_S * 0.75
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineDeadError, match="closed"):
        engine.wait_until_loaded()
