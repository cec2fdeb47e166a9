"""KV of running sequences beyond the device: the same tokens, wherever the blocks lie."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from plans import BLOCK_SIZE, make_plan
from zoo import make_prompts, reference, save_model

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from partition.profile import ModelProfile

NUM_TOKENS = 64
HOST_BLOCKS = {"host": 170, "on host": 170, "nvme": 0, "mixed": 40, "on host and nvme": 90}
PROMPTS = make_prompts()
CASES = [
    ("llama", 1, 1, "host"),
    ("llama", 2, 2, "on host"),
    ("deepseek_v3", 1, 1, "on host"),
    ("gpt_oss", 1, 1, "on host and nvme"),
    ("bloom", 1, 1, "on host"),
    ("llama", 1, 1, "nvme"),
    ("llama", 2, 2, "mixed"),
    ("gemma2", 1, 2, "mixed"),
    ("phi3", 1, 1, "mixed"),
    ("mixtral", 2, 1, "nvme"),
    ("deepseek_v3", 1, 2, "mixed"),
    ("deepseek_v3", 2, 1, "nvme"),
    ("bloom", 1, 1, "mixed"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("name", "tp", "pp", "beyond"), CASES)
def test_rotating_blocks_give_the_tokens_of_transformers(
    name: str, tp: int, pp: int, beyond: str, models: Path, launcher: Launcher
) -> None:
    path = save_model(name, models)
    if (refusal := ModelProfile.from_pretrained(path).why_not_tensor_parallel(tp)) is not None:
        pytest.skip(f"not legal: {refusal}")
    plan = make_plan(path, tp, pp, "device", device_blocks=24, host_blocks=24)
    # 24 of about 190 blocks on the device: nearly all that is attended to lies elsewhere
    plan = replace(
        plan,
        num_rotating_host_blocks=HOST_BLOCKS[beyond],
        num_rotating_nvme_blocks=170 - HOST_BLOCKS[beyond],
        num_tail_blocks=5 if beyond == "mixed" else 0,  # of 8 sequences
        attends_on_host=beyond.startswith("on host"),
        num_rotation_slots=128 // BLOCK_SIZE + 13,  # one or two sequences at a time
    )
    plan.validate()
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        outputs = llm.generate(PROMPTS, greedy)
        llm.generate(PROMPTS[2], greedy)
        again = llm.generate(PROMPTS[2], greedy)[0]
        stats = llm.stats()
    expected = reference(path, PROMPTS, NUM_TOKENS)
    assert [output.token_ids for output in outputs] == expected
    assert again.token_ids == expected[2]
    assert again.usage is not None and again.usage.cached_tokens > 0
    assert stats["kv"]["device_blocks_free"] == 24
    assert stats["kv"]["rotating_blocks_free"] == 170
    moved = {
        (link["source"], link["target"]): link["bytes"]
        for link in stats["shards"][0]["links"]
        if link["kind"] == "kv"
    }
    if beyond in ("host", "mixed"):
        assert moved["host", "device"] > moved["device", "host"] > 0
    if "nvme" in beyond or beyond == "mixed":
        assert moved["nvme", "device"] > moved["device", "nvme"] > 0
        assert list((path / "nvme" / "kv").iterdir()) == []


def test_what_lies_on_the_host_is_attended_to_there(models: Path, launcher: Launcher) -> None:
    path = save_model("llama", models)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    moved = []
    for attends_on_host in (False, True):
        plan = replace(
            make_plan(path, 1, 1, "device", device_blocks=8, host_blocks=0),
            num_rotating_host_blocks=200,
            num_rotation_slots=200,
            attends_on_host=attends_on_host,
        )
        with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
            llm.generate(PROMPTS, greedy)
            links = llm.stats()["shards"][0]["links"]
        moved.append(sum(each["bytes"] for each in links if each["source"] == "host"))
    # not even of the two sequences that begin on the device
    assert moved[1] == 0 < moved[0]


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [("llama", 1, 1), ("llama", 2, 2), ("gemma2", 1, 2), ("deepseek_v3", 1, 1)],
)
@pytest.mark.parametrize("storage_dtype", ["int8", "fp8"])
def test_lossy_storage_is_close(
    name: str, tp: int, pp: int, storage_dtype: str, models: Path, launcher: Launcher
) -> None:
    """Nearly all KV below the device in one byte an element, preempted sequences' too."""
    path = save_model(name, models)
    lossless = make_plan(path, tp, pp, "device", device_blocks=24, host_blocks=24)
    lossless = replace(
        lossless,
        num_rotating_host_blocks=8,
        num_rotating_nvme_blocks=160,
        num_tail_blocks=8,
        num_rotation_slots=128 // BLOCK_SIZE + 13,
    )
    greedy = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=0)
    runs, moved = [], []
    for dtype in ("auto", storage_dtype):
        plan = replace(lossless, kv_storage_dtype=dtype)
        with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
            runs.append(
                [output.choices[0].logprobs or [] for output in llm.generate(PROMPTS, greedy)]
            )
            links = [link for shard in llm.stats()["shards"] for link in shard["links"]]
        moved.append(sum(link["bytes"] for link in links if link["source"] == "nvme"))
    assert all(moved), "nothing came from NVMe: this proves nothing"
    off = []
    for exact, lossy in zip(*runs, strict=True):
        for a, b in zip(exact, lossy, strict=True):
            if a.chosen.token_id != b.chosen.token_id:
                break
            off.append(abs(a.chosen.logprob - b.chosen.logprob))
    limit = {"int8": 0.02, "fp8": 0.08}[storage_dtype]
    assert len(off) > len(PROMPTS), "not even the second tokens are the same"
    assert 0 < statistics.mean(off) < limit
