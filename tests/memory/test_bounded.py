"""What a shard keeps resident, as the operating system counts it, stays under its budgets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from giantserve import LLM, SamplingParams
from kvcache.tier import Tier
from tests.exactness.zoo import make_prompts
from tests.memory.big_llama import write_big_llama

MIB = 1 << 20
BUDGET = 256 * MIB
RUNTIME = 700 * MIB
PROMPTS = make_prompts((200, 64, 17, 120))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("big-llama")
    num_bytes = write_big_llama(folder)
    assert 1400 * MIB < num_bytes < 1700 * MIB
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def nvme_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "nvme"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def peak_bytes(pid: int) -> int:
    """The most memory the process ever had resident: VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} reports no VmHWM")


def peaks(model: Path, **options: Any) -> tuple[list[int], LLM]:
    """The peaks of all shards after loading, prefill and decode. The engine is closed."""
    with LLM(model, max_model_len=512, max_num_seqs=8, **options) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=4, temperature=0.0))
        assert all(len(output.token_ids) >= 1 for output in outputs)
        executor = llm._engine._executor
        found = [peak_bytes(pid) for pid in executor.worker_pids]  # type: ignore[attr-defined]
    return found, llm


@pytest.mark.parametrize("split", ["tensor_parallel", "pipeline_parallel"])
def test_a_shard_stays_under_its_budgets(split: str, model: Path, nvme_dir: Path) -> None:
    found, llm = peaks(
        model, device_memory=BUDGET, host_memory=BUDGET, nvme_dir=nvme_dir, **{split: 2}
    )
    assert len(found) == 2
    for shard, peak in zip(llm.plan.shards, found, strict=True):
        on_disk = shard.weight_bytes(Tier.NVME)
        assert on_disk > 150 * MIB, "the model was to be larger than its memory"
        print(f"{split} rank {shard.rank}: {peak / MIB:.0f} MiB, {on_disk / MIB:.0f} on disk")
        assert peak < 2 * BUDGET + RUNTIME, f"rank {shard.rank} reached {peak // MIB} MiB"


def test_the_measure_bites(model: Path) -> None:
    """With all of the model resident the same figure passes the same limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 5 << 30:
        pytest.skip("too little memory is free for the whole model")
    found, _ = peaks(model, device_memory="3GiB", host_memory=0, pipeline_parallel=1)
    assert found[0] > 2 * BUDGET + RUNTIME
