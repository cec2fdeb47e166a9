from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_models import LINK, PAGE, RATES, budget, llama_like

from partition.cluster import ClusterSpec, DeviceSpec, NodeSpec, StageDevices
from partition.cost import CostModel, PassShape, distinct_experts, pipeline_cycle_s
from partition.layer_split import split_layers
from partition.layout_search import LayoutSearch
from partition.sizing import Sizing
from partition.stage_table import StageTable


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
)
def test_the_slowest_stage_is_as_fast_as_in_the_best_of_all_cuts(
    num_layers: int, stages: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tables = []
    for _ in range(stages):
        table = random.integers(1, 30, (num_layers + 1, num_layers + 1)).astype(float)
        table[random.random(table.shape) < 0.2] = np.inf
        table[np.tril_indices_from(table)] = np.inf
        tables.append(table)
    prices = [
        max(table[run] for table, run in zip(tables, cut, strict=True))
        for cut in cuts(num_layers, stages)
    ]
    best = min(prices, default=np.inf)
    split = split_layers(tables)
    assert (split is None) == np.isinf(best)
    if split is not None:
        assert split in cuts(num_layers, stages)
        assert max(table[run] for table, run in zip(tables, split, strict=True)) == best


@settings(max_examples=25, deadline=None)
@given(
    mlps=st.lists(st.integers(1, 12), min_size=3, max_size=5),
    pages=st.lists(st.integers(8, 60), min_size=2, max_size=3),
    speeds=st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=3, max_size=3),
)
def test_unequal_devices_get_the_best_of_all_splits(
    mlps: list[int], pages: list[int], speeds: list[float]
) -> None:
    model = llama_like(num_layers=len(mlps), mlp_sizes=tuple(16 * size for size in mlps))
    stages = tuple(
        StageDevices(
            devices=(
                DeviceSpec(
                    budget=budget(device * PAGE, 4 * PAGE, 400 * PAGE),
                    bandwidths=RATES.shared_by(int(speed), ("disk", "memory")),
                ),
            ),
            group_link=LINK,
            next_link=LINK,
        )
        for device, speed in zip(pages, speeds, strict=False)
    )
    table = StageTable(model, 1)
    search = LayoutSearch(
        table,
        CostModel(
            profile=model,
            tensor_parallel=1,
            activation_bytes=2,
        ),
        stages,
        Sizing(
            num_device_blocks=1,
            num_host_blocks=0,
            max_model_len=16,
            max_num_seqs=1,
            max_num_batched_tokens=16,
            workspace_bytes=PAGE,
            kv_share=None,
        ),
        16,
        PassShape(num_tokens=1, num_sequences=1, context=16),
        {},
    )
    prices = [
        max(
            search.stage_time(held, run)
            for held, run in zip(search.stage_devices, cut, strict=True)
        )
        for cut in cuts(len(mlps), len(stages))
    ]
    best = min(prices)
    solution = search.solve()
    assert (solution is None) == (best == float("inf"))
    if solution is not None:
        assert max(solution.stage_times) == pytest.approx(best, rel=1e-9)
        assert search.bound() <= best * (1 + 1e-9)


def test_distinct_experts() -> None:
    assert distinct_experts(8, 2, 1) == pytest.approx(2.0)
    assert distinct_experts(8, 2, 2) == pytest.approx(3.5)
    assert distinct_experts(8, 2, 1000) == pytest.approx(8.0)


def test_a_pass_returns_when_all_stages_or_all_other_passes_are_done() -> None:
    assert pipeline_cycle_s([1.0, 2.0], 1) == 3.0
    assert pipeline_cycle_s([1.0, 2.0], 2) == 4.0


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
