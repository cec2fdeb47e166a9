"""The oracle: every plan gives the tokens that transformers.generate gives, in fp32, greedily."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from plans import BLOCK_SIZE, make_plan
from zoo import OVERRIDES, make_prompts, reference, save_model

from giantserve import LLM, SamplingParams
from giantserve.config import EngineConfig
from giantserve.errors import ConfigError
from giantserve.executor.launcher import Launcher
from giantserve.planning import plan_for
from partition.profile import ModelProfile
from partition.stage_table import StageTable

NUM_TOKENS = 64
TIERS = ("device", "host", "nvme", "mixed")
SPLITS = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2))
CORE = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "cohere",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt2",
    "opt",
    "bloom",
)
MIXTURES = tuple(name for name, options in OVERRIDES.items() if "num_experts" in options)
EXPERT_SPLITS = (
    (2, 1, "device"),
    (3, 1, "nvme"),
    (2, 1, "nvme"),
    (3, 1, "device"),
    (3, 2, "mixed"),
)
PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return tmp_path_factory.mktemp("models")


@cache
def expected(path: Path) -> list[list[int]]:
    return reference(path, PROMPTS, NUM_TOKENS)


def cases() -> list[object]:
    """Every core architecture at every split, on one tier in turn, and every other architecture at
    one split; the rest as the long tail."""
    found = []
    for number, name in enumerate(OVERRIDES):
        for place, (tp, pp) in enumerate(SPLITS):
            for index, tiers in enumerate(TIERS):
                in_turn = (number + place) % len(TIERS) == index
                if name not in CORE and not in_turn:
                    continue
                quick = in_turn and (name in CORE or (tp, pp) == SPLITS[number % len(SPLITS)])
                marks = () if quick else (pytest.mark.slow,)
                found.append(
                    pytest.param(
                        name, tp, pp, tiers, marks=marks, id=f"{name}-tp{tp}-pp{pp}-{tiers}"
                    )
                )
    return found


def expert_cases() -> list[object]:
    """Every mixture of experts at every split, whole experts dealt out; quick: the first mixtures
    at one split each."""
    return [
        pytest.param(
            *(name, tp, pp, tiers),
            marks=() if number == place and number < 4 else (pytest.mark.slow,),
            id=f"{name}-ep{tp}-pp{pp}-{tiers}",
        )
        for number, name in enumerate(MIXTURES)
        for place, (tp, pp, tiers) in enumerate(EXPERT_SPLITS)
    ]


@pytest.mark.parametrize(("name", "tp", "pp", "tiers"), cases())
def test_same_tokens_as_transformers(
    name: str, tp: int, pp: int, tiers: str, models: Path, launcher: Launcher
) -> None:
    check(save_model(name, models), tp, pp, tiers, launcher)


@pytest.mark.parametrize(
    ("name", "tp", "pp", "tiers"),
    [
        ("llama", 2, 1, "device"),
        ("llama", 3, 2, "mixed"),
        ("gpt_oss", 2, 2, "host"),
        ("mixtral", 2, 1, "nvme"),
        ("cohere", 2, 1, "host"),
        ("deepseek_v3", 2, 2, "device"),
        ("opt", 2, 1, "device"),
        ("bloom", 1, 2, "nvme"),
    ],
)
def test_a_prompt_alone_takes_several_passes(
    name: str, tp: int, pp: int, tiers: str, models: Path, launcher: Launcher
) -> None:
    """Passes that end in the middle of the only prompt need no logits at all."""
    path = save_model(name, models)
    plan = make_plan(path, tp, pp, tiers, device_blocks=64, host_blocks=0)
    prompts = make_prompts((110,), seed=3)
    assert plan.max_num_batched_tokens < 110 / 2
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        (output,) = llm.generate(
            prompts, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        )
    assert [output.token_ids] == reference(path, prompts, 12)


@pytest.mark.parametrize(("name", "tp", "pp", "tiers"), expert_cases())
def test_same_tokens_with_whole_experts_dealt_out(
    name: str, tp: int, pp: int, tiers: str, models: Path, launcher: Launcher
) -> None:
    path = save_model(name, models)
    shards = check(path, tp, pp, tiers, launcher, expert_parallel=True)
    if tiers == "device":  # the workers hold what the planner counted: 4 experts over 3 ranks, say
        assert pp == 1
        table = StageTable(ModelProfile.from_pretrained(path), tp, expert_parallel=True)
        profile = table.profile
        units = profile.stage_units(0, profile.num_layers)
        held = [sum(table.footprint(unit, rank) for unit in units) for rank in range(tp)]
        kv = [
            64 * profile.kv_layout(0, profile.num_layers, BLOCK_SIZE, rank, tp).block_bytes
            for rank in range(tp)
        ]
        used = [shard["device_used_bytes"] for shard in shards]
        assert used == [weights + blocks for weights, blocks in zip(held, kv, strict=True)]


def test_dealing_experts_out_makes_two_shards_of_one_machine(models: Path) -> None:
    path = save_model("mixtral", models)
    config = EngineConfig(
        model=str(path), expert_parallel=True, device="cpu", nvme_dir=path / "nvme"
    )
    made = plan_for(config)
    assert made.expert_parallel and made.tensor_parallel == 2


def test_a_plan_that_deals_out_what_is_not_there_is_refused(
    models: Path, launcher: Launcher
) -> None:
    path = save_model("llama", models)
    plan = make_plan(path, 2, 1, "device", device_blocks=64, host_blocks=64)
    wrong = replace(plan, expert_parallel=True)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts"):
        LLM(path, plan=wrong, nvme_dir=path / "nvme", launcher=launcher)


def check(
    path: Path,
    tp: int,
    pp: int,
    tiers: str,
    launcher: Launcher,
    expert_parallel: bool = False,
) -> list[dict[str, Any]]:
    """Hold the engine's tokens to the reference; returns what its shards counted."""
    refusal = ModelProfile.from_pretrained(path).why_not_tensor_parallel(tp)
    if refusal is not None:
        pytest.skip(f"not legal: {refusal}")
    # 64 blocks of 4 tokens hold two of the eight sequences at full length: KV must be demoted
    plan = make_plan(
        *(path, tp, pp, tiers),
        device_blocks=64,
        host_blocks=64,
        expert_parallel=expert_parallel,
    )
    assert plan.expert_parallel is expert_parallel
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(path, plan=plan, nvme_dir=path / "nvme", launcher=launcher) as llm:
        outputs = llm.generate(PROMPTS, greedy)
        llm.generate(PROMPTS[2], replace(greedy, max_tokens=1))
        again = llm.generate(PROMPTS[2], greedy)[0]
        stats = llm.stats()
    assert [output.token_ids for output in outputs] == expected(path)
    assert again.token_ids == expected(path)[2]
    assert again.usage is not None and again.usage.cached_tokens > 0
    assert stats["kv"]["device_blocks_free"] == 64
    copied = stats["shards"][0]["kv_bytes_copied"]
    assert copied["device_to_host"] > 0 and copied["host_to_device"] > 0, stats
    return list(stats["shards"])
