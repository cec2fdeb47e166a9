"""Shards that are really killed: everyone who waits is told, and nothing is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from giantserve import LLM, SamplingParams
from giantserve.errors import EngineDeadError
from giantserve.executor.base import CONNECT_TIMEOUT_S
from giantserve.executor.launcher import Launcher
from tests.faults.conftest import PROMPTS, Opener, tokens

LONG = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True)


def kill_while_generating(llm: LLM, rank: int, sign: int) -> list[BaseException]:
    """Kill a shard once three threads have requests under way; what each of them got."""
    pids = llm._engine._executor.worker_pids  # type: ignore[attr-defined]
    caught: list[BaseException] = []

    def ask(prompt: list[int]) -> None:
        try:
            while True:
                llm.generate([prompt] * 4, LONG)
        except BaseException as error:
            caught.append(error)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    while llm.stats()["running"] < 3:
        pass
    os.kill(pids[rank], sign)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"
    return caught


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_shard_ends_every_request(
    rank: int, pristine: Path, nvme_dir: Path, open_llm: Opener
) -> None:
    llm = open_llm(pristine, nvme_dir, pipeline_parallel=2)
    pids = llm._engine._executor.worker_pids  # type: ignore[attr-defined]
    caught = kill_while_generating(llm, rank, signal.SIGKILL)
    assert len(caught) == 3
    for error in caught:
        assert isinstance(error, EngineDeadError)
        assert f"shard {rank} died" in str(error) and "signal 9" in str(error)
    with pytest.raises(EngineDeadError, match=f"shard {rank} died"):
        llm.generate(PROMPTS, LONG)
    with pytest.raises(EngineDeadError):
        llm.stats()
    llm.close()
    llm.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_statistics_asked_while_a_shard_dies_do_not_hang_the_others(
    pristine: Path, nvme_dir: Path, open_llm: Opener
) -> None:
    llm = open_llm(pristine, nvme_dir, pipeline_parallel=2)
    ended = threading.Event()
    failures: list[BaseException] = []

    def watch() -> None:
        while not ended.is_set():
            try:
                llm.stats()
            except EngineDeadError:
                return
            except BaseException as error:
                failures.append(error)
                return

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    caught = kill_while_generating(llm, 1, signal.SIGKILL)
    ended.set()
    for watcher in watchers:
        watcher.join(60)
    assert not any(watcher.is_alive() for watcher in watchers) and not failures
    assert [type(error) for error in caught] == [EngineDeadError] * 3
    llm.close()


def test_a_new_engine_works_after_a_dead_one(
    pristine: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    llm = open_llm(pristine, nvme_dir)
    kill_while_generating(llm, 0, signal.SIGKILL)
    llm.close()
    with open_llm(pristine, nvme_dir) as again:
        assert tokens(again) == expected


def test_a_shard_that_dies_while_loading(
    pristine: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    killed: list[int] = []

    def kill(rank: int, progress: object) -> None:
        me = psutil.Process()
        workers = [p for p in me.children(recursive=True) if p.pid not in before]
        if not killed:
            killed.append(workers[-1].pid)
            os.kill(workers[-1].pid, signal.SIGKILL)

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with (  # a shard that had just finished loading is missed by the first pass
        pytest.raises(EngineDeadError, match=r"shard . died: its process ended with signal 9"),
        open_llm(pristine, nvme_dir, pipeline_parallel=2, on_progress=kill) as dead,
    ):
        tokens(dead)
    assert killed
    left = {p.pid for p in psutil.Process().children(recursive=True)} - before
    assert not left
    with open_llm(pristine, nvme_dir, pipeline_parallel=2) as again:
        assert tokens(again) == expected


def test_a_shard_that_dies_before_it_connects(
    pristine: Path, nvme_dir: Path, open_llm: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launcher.launch

    def misled(self: Launcher, address: tuple[str, int], authkey: bytes, rank: int) -> int:
        """Rank 1 connects where nobody listens."""
        return launch(self, address if rank == 0 else (address[0], 1), authkey, rank)

    monkeypatch.setattr(Launcher, "launch", misled)
    begun_s = time.monotonic()
    with pytest.raises(EngineDeadError, match="shard 1 died: its process ended with status 1"):
        open_llm(pristine, nvme_dir, pipeline_parallel=2)
    assert time.monotonic() - begun_s < CONNECT_TIMEOUT_S / 2
