"""Passes larger than what a layer computes at a time: the same tokens, wherever states wait."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import transformers
from plans import BLOCK_SIZE, make_plan
from zoo import make_prompts, reference, save_model

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from partition.plan import PartitionPlan
from partition.profile import ModelProfile

NUM_TOKENS = 24
SLICE_TOKENS, PASS_TOKENS = 16, 400
PAGE = 4096
PROMPTS = make_prompts()
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return tmp_path_factory.mktemp("models")


def sliced_plan(path: Path, tp: int, pp: int, tiers: str, states: str) -> PartitionPlan:
    """Slices of 16 tokens whose states wait on the host, on NVMe, or on both."""
    plan = make_plan(path, tp, pp, tiers, device_blocks=200, host_blocks=0)
    slices = 2 * PASS_TOKENS // SLICE_TOKENS + 1
    room = slices * 2 * PAGE  # fp32: 48 or 64 elements a row
    host = {"host": room, "nvme": 3 * PAGE, "mixed": 3 * PAGE + PAGE}[states]
    stages = tuple(
        replace(
            stage,
            shards=tuple(
                replace(
                    shard,
                    ring_bytes=2 * shard.ring_bytes,  # a layer's units at once
                    host_activation_bytes=host,
                    nvme_activation_bytes=0 if states == "host" else room,
                )
                for shard in stage.shards
            ),
        )
        for stage in plan.stages
    )
    made = replace(
        plan, stages=stages, max_slice_tokens=SLICE_TOKENS, max_num_batched_tokens=PASS_TOKENS
    )
    made.validate()
    return made


@pytest.mark.parametrize(
    ("name", "tp", "pp", "tiers", "states"),
    [
        ("llama", 1, 1, "device", "host"),
        ("llama", 2, 2, "nvme", "mixed"),
        ("llama-tied", 1, 1, "mixed", "nvme"),
        ("gemma2", 1, 2, "host", "mixed"),
        ("gpt2", 1, 1, "nvme", "nvme"),
        ("opt", 1, 2, "mixed", "host"),
        ("mixtral", 2, 1, "nvme", "nvme"),
        ("deepseek_v3", 1, 2, "nvme", "mixed"),
        ("bloom", 1, 1, "nvme", "mixed"),
        ("cohere", 2, 2, "host", "nvme"),
    ],
)
def test_sliced_passes_give_the_tokens_of_transformers(
    name: str, tp: int, pp: int, tiers: str, states: str, models: Path, launcher: Launcher
) -> None:
    path = save_model(name, models)
    if (refusal := ModelProfile.from_pretrained(path).why_not_tensor_parallel(tp)) is not None:
        pytest.skip(f"not legal: {refusal}")
    plan = sliced_plan(path, tp, pp, tiers, states)
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        stats = llm.stats()
    assert [output.token_ids for output in outputs] == reference(path, PROMPTS, NUM_TOKENS)
    # the first has all prompts, or those of them that had come
    assert stats["passes"] <= NUM_TOKENS + 2
    layers = {
        shard.rank: stage.end_layer - stage.first_layer
        for stage in plan.stages
        for shard in stage.shards
    }
    last = plan.stages[-1].shards[0].rank
    for rank, shard in enumerate(stats["shards"]):
        if layers[rank] == 1 and rank < last:
            continue  # what a single layer gives goes on to the next stage at once
        links = {
            (link["source"], link["target"]): link["bytes"]
            for link in shard["links"]
            if link["kind"] == "activations"
        }
        assert (links.get(("device", "nvme"), 0) > 0) == (states != "host")
        assert (links.get(("device", "host"), 0) > 0) == (states != "nvme")
    if states != "host":
        assert list((path / "nvme" / "activations").iterdir()) == []


@pytest.mark.parametrize("beyond", ["host", "nvme"])
def test_kv_rotates_slice_by_slice(beyond: str, models: Path, launcher: Launcher) -> None:
    path = save_model("llama", models)
    plan = replace(
        sliced_plan(path, 1, 1, "nvme", "mixed"),
        num_device_blocks=24,
        num_rotating_host_blocks=200 if beyond == "host" else 0,
        num_rotating_nvme_blocks=200 if beyond == "nvme" else 0,
        num_rotation_slots=128 // BLOCK_SIZE + 13,
    )
    plan.validate()
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == reference(path, PROMPTS, NUM_TOKENS)


def test_a_long_prompt_takes_one_pass(models: Path, launcher: Launcher) -> None:
    """Its chunks are slices of the same pass: the later see the KV of the earlier."""
    path = save_model("llama", models)
    plan = sliced_plan(path, 1, 1, "nvme", "mixed")
    prompts = make_prompts((100,), seed=3)
    wanted = replace(GREEDY, prompt_logprobs=1)
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        (output,) = llm.generate(prompts, wanted)
        assert llm.stats()["passes"] == NUM_TOKENS
    whole = make_plan(path, 1, 1, "device", device_blocks=200, host_blocks=0)
    with LLM(path, plan=whole, nvme_dir=path / "nvme", launcher=launcher) as llm:
        (expected,) = llm.generate(prompts, wanted)
    assert [output.token_ids] == reference(path, prompts, NUM_TOKENS)
    ours, theirs = output.prompt_logprobs, expected.prompt_logprobs
    assert ours is not None and theirs is not None and len(ours) == len(theirs) == 100
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.chosen.token_id == other.chosen.token_id
        assert mine.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)


def _spoil(fault: Callable[[int], None], stop: threading.Event) -> None:
    """Do this to the file of activations, again and again."""
    while not stop.is_set():
        for process in psutil.Process().children(recursive=True):
            folder = Path(f"/proc/{process.pid}/fd")
            try:
                for name in os.listdir(folder):
                    if os.readlink(folder / name).endswith(".activations (deleted)"):
                        descriptor = os.open(folder / name, os.O_RDWR)
                        fault(descriptor)
                        os.close(descriptor)
            except OSError:
                continue
        time.sleep(0.001)


def _flip(descriptor: int) -> None:
    for offset in range(0, os.fstat(descriptor).st_size, PAGE):
        (byte,) = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([byte ^ 1]), offset)


@pytest.mark.parametrize("fault", [_flip, None])
def test_states_that_the_disk_spoils_are_computed_again(
    fault: Callable[[int], None] | None, models: Path, launcher: Launcher
) -> None:
    """One pass meets a disk that flips bits; the control meets none."""
    path = save_model("llama", models)
    plan = sliced_plan(path, 1, 1, "nvme", "nvme")
    stop = threading.Event()
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        thread = threading.Thread(target=_spoil, args=(fault or (lambda _: None), stop))
        generating = threading.Thread(target=lambda: outputs.extend(llm.generate(PROMPTS, GREEDY)))
        outputs: list[object] = []
        thread.start()
        generating.start()
        while fault and generating.is_alive() and llm.stats()["kv"]["losses"] == 0:
            time.sleep(0.001)
        stop.set()
        thread.join()
        generating.join()
        losses = llm.stats()["kv"]["losses"]
    assert (losses > 0) == (fault is not None)
    assert [out.token_ids for out in outputs] == reference(path, PROMPTS, NUM_TOKENS)  # type: ignore[attr-defined]
