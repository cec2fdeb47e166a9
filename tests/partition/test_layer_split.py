from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_models import LINK, RATES, budget, llama_like

from partition import Constraints, PartitionPlan, PlanError, plan
from partition.cluster import ClusterSpec, DeviceSpec, NodeSpec
from partition.layer_split import chain_times, cut_time, cut_times, split_layers
from partition.routing import distinct_experts


def cuts(num_layers: int, stages: int) -> list[tuple[tuple[int, int], ...]]:
    return [
        tuple(zip((0, *inner), (*inner, num_layers), strict=True))
        for inner in combinations(range(1, num_layers), stages - 1)
    ]


@settings(deadline=None)
@given(
    num_layers=st.integers(1, 7),
    stages=st.integers(1, 4),
    seed=st.integers(0, 1 << 20),
    in_turn=st.booleans(),
)
def test_a_split_is_as_fast_as_the_best_of_all_cuts(
    num_layers: int, stages: int, seed: int, in_turn: bool
) -> None:
    random = np.random.default_rng(seed)
    tables = []
    for _ in range(stages):
        table = random.integers(1, 30, (num_layers + 1, num_layers + 1)).astype(float)
        table[random.random(table.shape) < 0.2] = np.inf
        table[np.tril_indices_from(table)] = np.inf
        tables.append(table)

    def price(cut: tuple[tuple[int, int], ...]) -> float:
        times = [float(table[run]) for table, run in zip(tables, cut, strict=True)]
        return stages * max(times) if in_turn else sum(times)

    best = min(map(price, cuts(num_layers, stages)), default=np.inf)
    split = split_layers(tables, in_turn)
    assert (split is None) == np.isinf(best)
    if split is not None:
        assert split in cuts(num_layers, stages)
        assert price(split) == best
    places = np.arange(stages)[None, :]
    assert cut_times(np.stack(tables), places, in_turn).tolist() == [best]
    alike = [tables[0]] * stages
    chain = chain_times(tables[0], stages, in_turn)[-1]
    assert chain == cut_times(np.stack(alike), places, in_turn)[0]


def test_distinct_experts() -> None:
    assert distinct_experts(8, 2, 1) == pytest.approx(2.0)
    assert distinct_experts(8, 2, 2) == pytest.approx(3.5)
    assert distinct_experts(8, 2, 1000) == pytest.approx(8.0)


def test_passes_in_turn_wait_for_the_slowest_stage_and_one_pass_for_all() -> None:
    assert cut_time([1.0, 2.0], in_turn=True) == 4.0
    assert cut_time([1.0, 2.0], in_turn=False) == 3.0


def test_collectives_by_message_size() -> None:
    assert LINK.all_reduce_s(1e9, 1) == 0.0
    assert LINK.all_reduce_s(1e9, 4) == pytest.approx(1.5 + 1e-6)
    assert LINK.send_s(5e8) == pytest.approx(0.5 + 1e-6)


def test_ranks_go_to_devices_in_the_order_of_the_nodes() -> None:
    left, right = (
        NodeSpec(
            name=name,
            link=LINK,
            devices=(DeviceSpec(budget=budget(size), bandwidths=RATES),),
        )
        for name, size in (("left", 1), ("right", 2))
    )
    cluster = ClusterSpec(nodes=(left, right), network=LINK)
    assert [d.budget.device_bytes for d in cluster.devices(2)] == [1, 2]
    assert [d.bandwidths.disk_read for d in cluster.devices(2)] == [1e9, 1e9]


def test_a_fixed_split_is_kept_and_no_better_one_is_missed() -> None:
    model = llama_like(num_layers=5)
    rates = (RATES, replace(RATES, device_memory=4 * RATES.device_memory))
    devices = tuple(
        DeviceSpec(name=str(index), budget=budget(1 << 30), bandwidths=each)
        for index, each in enumerate(rates)
    )
    cluster = ClusterSpec(nodes=(NodeSpec(devices=devices, name="n", link=LINK),))

    def planned(split: tuple[int, ...] | None, stages: int | None = 2) -> PartitionPlan:
        fixed = Constraints(tensor_parallel=1, pipeline_parallel=stages, layer_split=split)
        return plan(model, cluster, constraints=fixed)

    by_split = {split: planned(split) for split in ((1, 4), (2, 3), (3, 2), (4, 1))}
    for split, made in by_split.items():
        assert tuple(s.end_layer - s.first_layer for s in made.stages) == split
    best = max(made.forecast.tokens_per_s for made in by_split.values())
    assert planned(None).forecast.tokens_per_s == best
    assert planned((2, 3), None).pipeline_parallel == 2
    with pytest.raises(PlanError, match=r"layer_split is 2, 2, 4 layers in all, .* has 5"):
        planned((2, 2))
    with pytest.raises(PlanError, match="layer_split names 2 stages"):
        planned((2, 3), 1)
    with pytest.raises(PlanError, match="at least 1 layer"):
        planned((5, 0))
