from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_models import LINK, RATES, budget

from partition.cluster import ClusterSpec, DeviceSpec, NodeSpec
from partition.cost import distinct_experts
from partition.layer_split import chain_times, cut_time, cut_times, split_layers


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
