"""What messages and sums over a link take, by exact value."""

from __future__ import annotations

import math

import pytest

from partition import Link, PlanError

LINK = Link(bandwidth=8e9, latency_s=1e-3)
MEASURED = Link(bandwidth=8e9, latency_s=1e-3, all_reduce_bandwidth=2e9, all_reduce_latency_s=0.0)


def test_a_message_takes_its_latency_and_its_bytes() -> None:
    assert LINK.send_s(0) == 1e-3
    assert LINK.send_s(8e9) == 1.001
    assert MEASURED.send_s(8e9) == 1.001


@pytest.mark.parametrize(("world", "moved"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_a_sum_moves_the_share_of_a_ring(world: int, moved: float) -> None:
    assert LINK.all_reduce_s(8e9, world) == pytest.approx(1e-3 + moved, rel=1e-12)


def test_a_sum_has_rates_of_its_own_where_these_were_measured() -> None:
    assert MEASURED.all_reduce_s(8e9, 4) == 6.0
    assert MEASURED.all_reduce_s(0, 4) == 0.0


def test_one_rank_has_nothing_to_sum() -> None:
    assert LINK.all_reduce_s(8e9, 1) == 0.0


@pytest.mark.parametrize("name", ["bandwidth", "all_reduce_bandwidth"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_bandwidth_is_refused(name: str, value: float) -> None:
    with pytest.raises(PlanError, match=rf"^{name}: .* cannot be"):
        Link(**({"bandwidth": 1.0, "latency_s": 0.0} | {name: value}))


@pytest.mark.parametrize("name", ["latency_s", "all_reduce_latency_s"])
@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
def test_an_impossible_latency_is_refused(name: str, value: float) -> None:
    with pytest.raises(PlanError, match=rf"^{name}: .* cannot be"):
        Link(**({"bandwidth": 1.0, "latency_s": 0.0} | {name: value}))


def test_between_nodes_each_device_brings_a_rail_until_the_nodes_bind() -> None:
    wide = Link(bandwidth=1e9, latency_s=0.0, all_reduce_bandwidth=3e9)
    seconds = [wide.between_nodes(count).all_reduce_s(6e9, 2) for count in (1, 2, 4)]
    assert seconds == [6.0, 3.0, 2.0]
    assert LINK.between_nodes(2).all_reduce_bandwidth == 16e9
