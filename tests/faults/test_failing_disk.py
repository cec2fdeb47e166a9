"""A disk that fails, fills, vanishes or crawls while KV of running sequences is on it."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from giantserve import LLM
from giantserve.calibrate import calibrate
from giantserve.errors import EngineDeadError
from giantserve.executor.launcher import Launcher
from giantserve.probes.storage import probe_backends
from tests.exactness.zoo import reference
from tests.faults.loop_disk import Disk, mounted_disk
from tests.faults.test_lost_kv import GREEDY, NUM_TOKENS, PROMPTS, rotating_plan

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from throttle import Throttle

DISK_BYTES = 64 << 20


@pytest.fixture
def loop_disk(tmp_path: Path) -> Iterator[Disk]:
    """Skips, with the reason, where this user may not make one."""
    with mounted_disk(tmp_path, DISK_BYTES) as disk:
        nvme_dir = disk.folder / "nvme"
        nvme_dir.mkdir(mode=0o700)
        calibrate(nvme_dir, dtype="float32")  # before it fails, whichever test is first
        yield disk


@contextmanager
def running(llm: LLM, answers: list[list[int]]) -> Iterator[None]:
    """The prompts, half answered; leaving waits for the rest."""
    outputs: list[list[int]] = []
    thread = threading.Thread(
        target=lambda: outputs.extend(o.token_ids for o in llm.generate(PROMPTS, GREEDY))
    )
    thread.start()
    while thread.is_alive() and llm.stats()["generated_tokens"] < 150:
        time.sleep(0.005)
    assert thread.is_alive(), "it was over before the disk failed"
    try:
        yield
    finally:
        thread.join(120)
        assert not thread.is_alive(), "it hangs"
        answers += outputs


def losses_and_answers(
    path: Path, nvme_dir: Path, launcher: Launcher, fault: Callable[[], None]
) -> tuple[int, list[list[int]]]:
    """Blocks lost, and the answers to the prompts during the fault and after it."""
    answers: list[list[int]] = []
    with LLM(path, plan=rotating_plan(path, 1), nvme_dir=nvme_dir, launcher=launcher) as llm:
        with running(llm, answers):
            fault()
        answers += [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
        return llm.stats()["kv"]["losses"], answers


def test_a_small_disk_is_measured_and_left_empty(loop_disk: Disk) -> None:
    nvme_dir = loop_disk.folder / "nvme"
    rates = probe_backends(nvme_dir)
    assert all(rate > 0 for rate in rates.values())
    assert "posix" in rates
    assert list(nvme_dir.iterdir()) == []


def test_reads_that_fail_lose_kv_and_no_token(
    loop_disk: Disk, pristine: Path, launcher: Launcher
) -> None:
    """What lies past the end of a loop device's file cannot be read: EIO."""
    nvme_dir = loop_disk.folder / "nvme"
    losses, answers = losses_and_answers(
        pristine, nvme_dir, launcher, lambda: os.truncate(loop_disk.image, 1 << 20)
    )
    assert losses > 0
    assert answers == 2 * reference(pristine, PROMPTS, NUM_TOKENS)


def test_a_disk_that_fills_up_has_room_for_what_was_reserved(
    loop_disk: Disk, pristine: Path, launcher: Launcher
) -> None:
    def fill() -> None:
        with (
            pytest.raises(OSError, match="No space left"),
            (loop_disk.folder / "others").open("wb", buffering=0) as file,
        ):
            while True:
                file.write(bytes(1 << 20))

    losses, answers = losses_and_answers(pristine, loop_disk.folder / "nvme", launcher, fill)
    assert losses == 0
    assert answers == 2 * reference(pristine, PROMPTS, NUM_TOKENS)


def test_a_disk_that_is_full_already_is_refused(
    loop_disk: Disk, pristine: Path, launcher: Launcher
) -> None:
    free = shutil.disk_usage(loop_disk.folder).free
    with (loop_disk.folder / "others").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - (64 << 10))
    plan = rotating_plan(pristine, 1)
    with pytest.raises(EngineDeadError, match=r"cannot reserve .* give another nvme_dir"):
        LLM(pristine, plan=plan, nvme_dir=loop_disk.folder / "nvme", launcher=launcher).close()


def test_a_folder_that_is_removed_is_not_missed(
    pristine: Path, tmp_path: Path, launcher: Launcher
) -> None:
    nvme_dir = tmp_path / "nvme"
    expected = reference(pristine, PROMPTS, NUM_TOKENS)

    def remove() -> None:
        assert (nvme_dir / "kv").is_dir()
        shutil.rmtree(nvme_dir)

    assert losses_and_answers(pristine, nvme_dir, launcher, remove) == (0, 2 * expected)


def test_a_disk_that_crawls_delays_and_does_no_more(
    pristine: Path, disk: Path, launcher: Launcher
) -> None:
    answers: list[list[int]] = []
    plan = rotating_plan(pristine, 1)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with LLM(pristine, plan=plan, nvme_dir=disk, launcher=launcher) as llm:
        (pid,) = llm._engine._executor.worker_pids  # type: ignore[attr-defined]
        assert pid not in before
        read = _bytes_read(llm)
        started_s = time.perf_counter()
        llm.generate(PROMPTS, GREEDY)
        free_s = time.perf_counter() - started_s
        rate = (_bytes_read(llm) - read) / free_s / 50
        try:
            throttle = Throttle("crawl", pid, disk, rate)
        except OSError as error:
            pytest.skip(f"disks cannot be throttled here: {error}")
        with throttle:
            begun = llm.stats()["generated_tokens"]
            with running(llm, answers):
                started_s = time.perf_counter()
                at = llm.stats()["generated_tokens"]
                time.sleep(1.0)
                crawl = (llm.stats()["generated_tokens"] - at) / (time.perf_counter() - started_s)
                throttle.close()
            assert llm.stats()["generated_tokens"] - begun == len(PROMPTS) * NUM_TOKENS
    assert crawl < len(PROMPTS) * NUM_TOKENS / free_s / 5, "the throttle was not felt"
    assert answers == reference(pristine, PROMPTS, NUM_TOKENS)


def _bytes_read(llm: LLM) -> int:
    (shard,) = llm.stats()["shards"]
    return sum(link["bytes"] for link in shard["links"] if link["source"] == "nvme")
