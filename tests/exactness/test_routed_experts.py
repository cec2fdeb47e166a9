"""Experts that do not stay on the device: only those that a pass routes to are read, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plans import make_plan
from zoo import MOE, OVERRIDES, make_config, make_prompts, reference

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from kvcache.tier import Tier
from partition.profile import ModelProfile

NUM_EXPERTS = 16
NUM_TOKENS = 24
EXPERTS = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), NUM_EXPERTS)
CASES = [
    ("qwen3_moe", 1, 1, False),
    ("mixtral", 2, 1, False),
    ("mixtral", 2, 1, True),
    ("deepseek_v3", 1, 2, False),
    ("gpt_oss", 1, 1, False),
    ("olmoe", 2, 2, True),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return tmp_path_factory.mktemp("models")


def save_many_experts(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The architecture's tiny model with 16 experts, 2 for a token."""
    path = folder / name
    if not path.exists():
        monkeypatch.setitem(OVERRIDES, name, {**OVERRIDES[name], **MOE, **EXPERTS})
        torch.manual_seed(3)
        transformers.AutoModelForCausalLM.from_config(make_config(name)).save_pretrained(path)
    return path


def read_bytes(stats: dict[str, Any], tier: Tier) -> int:
    """Bytes of weights that the shards brought from ``tier``."""
    links = [link for shard in stats["shards"] for link in shard["links"]]
    return sum(
        link["bytes"] for link in links if (link["kind"], link["source"]) == ("weights", tier.value)
    )


@pytest.mark.parametrize("tier", [Tier.NVME, Tier.HOST])
@pytest.mark.parametrize(("name", "tp", "pp", "expert_parallel"), CASES)
def test_a_pass_reads_the_experts_that_it_routes_to(
    name: str,
    tp: int,
    pp: int,
    expert_parallel: bool,
    tier: Tier,
    models: Path,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save_many_experts(name, models, monkeypatch)
    plan = make_plan(
        path,
        tp,
        pp,
        tier.value,
        device_blocks=64,
        host_blocks=0,
        expert_parallel=expert_parallel,
    )
    prompts = make_prompts((30, 7))
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        alone = [llm.generate(prompt, greedy)[0].token_ids for prompt in prompts]
        llm.generate([5], SamplingParams(max_tokens=1))
        before = llm.stats()
        llm.generate([5], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
        after = llm.stats()
    assert alone == reference(path, prompts, NUM_TOKENS)
    profile = ModelProfile.from_pretrained(path)
    experts = sum(
        spec.num_elements * spec.dtype_bytes
        for unit in profile.units
        for spec in unit.parameters
        if profile.is_routed(spec)
    )
    assert experts > 0
    streamed = sum(p.num_bytes for s in plan.shards for p in s.placements if p.tier is tier)
    passes = after["shards"][0]["passes"] - before["shards"][0]["passes"]
    assert passes == 9
    a_pass = (read_bytes(after, tier) - read_bytes(before, tier)) / passes
    dense = streamed - experts
    pages = 2 * 2 * 2 * 4096 * profile.num_layers * tp  # an expert's tensors begin and end anywhere
    assert a_pass <= dense + experts * 2 / NUM_EXPERTS + pages + 4096 * 4 * profile.num_layers
    assert a_pass < dense + experts
