"""KV on NVMe that the disk loses while it is in use: computed again, never a wrong token."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from partition.plan import PartitionPlan
from tests.exactness.plans import make_plan
from tests.exactness.zoo import reference

PAGE = 4096
NUM_TOKENS = 96
PROMPTS = [[3 + i, 5, 7 + i, 11] * 4 for i in range(6)]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def rotating_plan(path: Path, pipeline_parallel: int) -> PartitionPlan:
    """Nearly all KV on NVMe."""
    plan = make_plan(path, 1, pipeline_parallel, "device", device_blocks=8, host_blocks=16)
    return replace(plan, num_rotating_nvme_blocks=200, num_rotation_slots=40)


def kv_files() -> list[str]:
    """The nameless files of the workers below this process, as paths that can be opened."""
    found = []
    for process in psutil.Process().children(recursive=True):
        folder = Path(f"/proc/{process.pid}/fd")
        for name in os.listdir(folder):
            try:
                target = os.readlink(folder / name)
            except FileNotFoundError:
                continue
            if target.endswith(".kv (deleted)"):
                found.append(str(folder / name))
    return found


def flip_bits(path: str) -> None:
    """One bit in every page that holds anything."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        for offset in range(0, os.fstat(descriptor).st_size, PAGE):
            page = bytearray(os.pread(descriptor, PAGE, offset))
            if any(page):
                page[offset // PAGE % 64] ^= 16
                os.pwrite(descriptor, page, offset)
    finally:
        os.close(descriptor)


def cut(path: str) -> None:
    """No byte is left: reads end early, until blocks are written anew."""
    descriptor = os.open(path, os.O_RDWR)
    os.ftruncate(descriptor, 0)
    os.close(descriptor)


def spare(path: str) -> None:
    """The control: nothing happens to the disk."""


@pytest.mark.parametrize(
    ("fault", "pipeline_parallel"), [(spare, 1), (flip_bits, 1), (flip_bits, 2), (cut, 1)]
)
def test_lost_kv_is_computed_again(
    fault: Callable[[str], None],
    pipeline_parallel: int,
    pristine: Path,
    disk: Path,
    launcher: Launcher,
) -> None:
    plan = rotating_plan(pristine, pipeline_parallel)
    outputs = []
    with LLM(pristine, plan=plan, nvme_dir=disk, launcher=launcher) as llm:
        thread = threading.Thread(target=lambda: outputs.extend(llm.generate(PROMPTS, GREEDY)))
        thread.start()
        while thread.is_alive() and llm.stats()["generated_tokens"] < 150:
            time.sleep(0.005)
        assert thread.is_alive(), "it was over before the disk failed"
        files = kv_files()
        assert len(files) == pipeline_parallel
        fault(files[0])
        thread.join()
        after = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
        losses = llm.stats()["kv"]["losses"]
    expected = reference(pristine, PROMPTS, NUM_TOKENS)
    assert [output.token_ids for output in outputs] == expected
    assert after == expected
    assert (losses > 0) == (fault is not spare)
