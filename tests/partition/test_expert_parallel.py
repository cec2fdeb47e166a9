"""Whole experts dealt out over the ranks of a stage: exact bytes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from planner_models import LINK, RATES, budget, llama_like
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig

from partition import ClusterSpec, Constraints, ModelProfile, PartitionPlan, PlanError, plan
from partition.sharding import ParameterSpec
from partition.stage_table import StageTable

HIDDEN, INTER, EXPERTS, LAYERS = 48, 80, 8, 2
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "dtype": torch.bfloat16,
}
DEEPSEEK = DeepseekV3Config(
    **COMMON,
    n_routed_experts=EXPERTS,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=INTER,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
)


@pytest.fixture(scope="module")
def mixtral() -> ModelProfile:
    return ModelProfile.from_config(MixtralConfig(**COMMON, num_local_experts=EXPERTS))


@pytest.fixture(scope="module")
def deepseek() -> ModelProfile:
    return ModelProfile.from_config(DEEPSEEK)


def specs(profile: ModelProfile) -> dict[str, ParameterSpec]:
    return {spec.name: spec for unit in profile.units for spec in unit.parameters}


def on(num_devices: int) -> ClusterSpec:
    return ClusterSpec.local(num_devices, budget(16 << 20, 1 << 20, 64 << 20), RATES, LINK)


@pytest.mark.parametrize("world", [2, 3, 5, 6])
def test_each_rank_holds_whole_experts(mixtral: ModelProfile, world: int) -> None:
    table = StageTable(mixtral, world, expert_parallel=True)
    an_expert = 3 * INTER * HIDDEN * 2
    counts = [(rank + 1) * EXPERTS // world - rank * EXPERTS // world for rank in range(world)]
    held = [load.expert_bytes[0, LAYERS] for load in table.loads]
    assert held == [LAYERS * count * an_expert for count in counts]
    assert sum(held) == LAYERS * EXPERTS * an_expert
    router = EXPERTS * HIDDEN * 2
    mlp = next(unit for unit in table.profile.units if unit.name == "layers.1.mlp")
    for rank, count in enumerate(counts):
        assert table.unit_bytes(mlp, rank) == count * an_expert + router


def test_experts_are_dealt_in_order_and_each_once(mixtral: ModelProfile) -> None:
    spec = specs(mixtral.expert_parallel_variant)["model.layers.0.mlp.experts.gate_up_proj"]
    assert [spec.ranges(mixtral.heads, rank, 3) for rank in range(3)] == [
        ((0, 2),),
        ((2, 5),),
        ((5, 8),),
    ]
    assert spec.local_shape(mixtral.heads, 1, 3) == (3, 2 * INTER, HIDDEN)


def test_all_but_the_routed_experts_is_split_as_without(deepseek: ModelProfile) -> None:
    before, after = specs(deepseek), specs(deepseek.expert_parallel_variant)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    shared = after["model.layers.1.mlp.shared_experts.down_proj.weight"]
    assert shared.local_shape(deepseek.heads, 0, 2) == (HIDDEN, INTER // 2)
    cut, whole = StageTable(deepseek, 2), StageTable(deepseek, 2, expert_parallel=True)
    for one, other in zip(cut.loads, whole.loads, strict=True):
        assert one.dense_bytes[0, LAYERS] == other.dense_bytes[0, LAYERS]
        assert one.expert_bytes[0, LAYERS] == other.expert_bytes[0, LAYERS]


def test_biases_of_experts_go_with_them() -> None:
    config = GptOssConfig(**COMMON, num_local_experts=EXPERTS, head_dim=8)
    profile = ModelProfile.from_config(config).expert_parallel_variant
    prefix = "model.layers.0.mlp.experts."
    shapes = {
        name.removeprefix(prefix): spec.local_shape(profile.heads, 1, 3)
        for name, spec in specs(profile).items()
        if name.startswith(prefix)
    }
    assert shapes == {
        "gate_up_proj": (3, HIDDEN, 2 * INTER),
        "gate_up_proj_bias": (3, 2 * INTER),
        "down_proj": (3, INTER, HIDDEN),
        "down_proj_bias": (3, HIDDEN),
    }


def test_the_plan_says_so_and_survives_json(mixtral: ModelProfile) -> None:
    fixed = Constraints(tensor_parallel=3, expert_parallel=True)
    made = plan(mixtral, on(3), constraints=fixed)
    assert made.expert_parallel
    held = [next(p for p in s.placements if p.unit == "layers.0.mlp") for s in made.shards]
    assert held[1].num_bytes - held[0].num_bytes == 3 * INTER * HIDDEN * 2
    assert PartitionPlan.from_json(made.to_json()) == made
    with pytest.raises(PlanError, match="expert_parallel: must be true or false"):
        PartitionPlan.from_json(
            made.to_json().replace('"expert_parallel": true', '"expert_parallel": 1')
        )


def test_a_plan_of_one_rank_cannot_deal_experts_out(mixtral: ModelProfile) -> None:
    made = plan(mixtral, on(1))
    assert not made.expert_parallel
    with pytest.raises(PlanError, match="tensor_parallel is 1"):
        replace(made, expert_parallel=True).validate()


def test_left_open_it_is_chosen_where_it_is_forecast_to_be_faster(mixtral: ModelProfile) -> None:
    made = {
        choice: plan(
            mixtral, on(2), constraints=Constraints(tensor_parallel=2, expert_parallel=choice)
        )
        for choice in (None, False, True)
    }
    assert made[True].expert_parallel and not made[False].expert_parallel
    fastest = max(made[True], made[False], key=lambda each: each.forecast.tokens_per_s)
    assert made[None].forecast.tokens_per_s == fastest.forecast.tokens_per_s


def test_left_open_the_degree_is_more_than_one(mixtral: ModelProfile) -> None:
    made = plan(mixtral, on(2), constraints=Constraints(expert_parallel=True))
    assert made.expert_parallel and made.tensor_parallel == 2
    with pytest.raises(PlanError, match=r"tensor_parallel 2 .* the cluster has 1"):
        plan(mixtral, on(1), constraints=Constraints(expert_parallel=True))


@pytest.mark.parametrize(
    ("world", "said"),
    [
        (1, "a single tensor-parallel rank holds all experts"),
        (9, "9 ranks for 6 attention heads"),
    ],
)
def test_illegal_degrees(mixtral: ModelProfile, world: int, said: str) -> None:
    fixed = Constraints(tensor_parallel=world, expert_parallel=True)
    with pytest.raises(PlanError, match=f"expert_parallel is true, .*: {said}"):
        plan(mixtral, on(9), constraints=fixed)


def test_more_ranks_than_experts() -> None:
    few = ModelProfile.from_config(MixtralConfig(**COMMON, num_local_experts=4))
    assert few.why_not_expert_parallel(4) is None
    assert "4 elements do not reach 5 ranks" in str(few.why_not_expert_parallel(5))


def test_a_dense_model_has_none() -> None:
    with pytest.raises(PlanError, match="LlamaLike has no experts"):
        plan(llama_like(), on(2), constraints=Constraints(expert_parallel=True))


def test_experts_without_a_plan_are_named(mixtral: ModelProfile) -> None:
    unplanned = replace(mixtral, expert_styles={})
    reason = unplanned.why_not_expert_parallel(2)
    assert reason == "MixtralForCausalLM has no plan for dealing out its experts"
