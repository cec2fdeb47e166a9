from __future__ import annotations

from dataclasses import replace

import pytest
from planner_models import LINK, RATES, budget, llama_like

from partition import (
    ClusterSpec,
    DeviceSpec,
    Link,
    NodeSpec,
    Objective,
    PlanError,
    Workload,
    plan,
    runners_up,
)

MIB = 1 << 20
MODEL = llama_like(num_layers=6, hidden=256, inter=1024)
USUAL = Workload(prompt_tokens=64, output_tokens=32, concurrency=8)


def device(speed: int, memory: int) -> DeviceSpec:
    return DeviceSpec(
        budget=budget(memory * MIB, 0, 64 * MIB),
        bandwidths=RATES.shared_by(speed, ("disk", "memory", "compute")),
        name=f"speed-{speed}",
    )


def node(name: str, *devices: DeviceSpec) -> NodeSpec:
    return NodeSpec(name=name, devices=devices, link=LINK)


UNEQUAL = ClusterSpec(
    nodes=(node("slow", device(4, 3), device(4, 3)), node("fast", device(1, 16))),
    network=Link(bandwidth=1e9, latency_s=1e-6),
)


def test_the_best_device_is_taken_wherever_it_stands() -> None:
    made = plan(MODEL, UNEQUAL, USUAL)
    assert [(shard.node, shard.device) for shard in made.shards] == [("fast", "speed-1")]


def test_every_shard_has_a_device_of_its_own() -> None:
    small = replace(UNEQUAL, nodes=(UNEQUAL.nodes[0], node("fast", device(1, 4))))
    made = plan(MODEL, small, USUAL)
    places = [(shard.node, shard.device) for shard in made.shards]
    assert len(set(places)) == len(places) > 1
    assert {place for place in places if place[0] == "slow"} <= {
        ("slow", "speed-4-0"),
        ("slow", "speed-4-1"),
    }


def test_least_devices_is_fewer_than_the_fastest_needs() -> None:
    cluster = ClusterSpec.local(4, budget(6 * MIB, 0, 64 * MIB), RATES, LINK, shared=())
    fastest = plan(MODEL, cluster, USUAL)
    fewest = plan(MODEL, cluster, USUAL, Objective.LEAST_DEVICES)
    assert len(fewest.shards) == 1 < len(fastest.shards)
    limit = fewest.forecast.time_per_output_token_s / 2
    limited = replace(USUAL, tpot_limit_s=limit)
    more = plan(MODEL, cluster, limited, Objective.LEAST_DEVICES)
    assert 1 < len(more.shards) <= len(fastest.shards)
    assert more.forecast.time_per_output_token_s <= limit


def test_a_limit_costs_throughput_and_is_kept() -> None:
    cluster = ClusterSpec.local(2, budget(32 * MIB), RATES, LINK)
    many = replace(USUAL, concurrency=64)
    free = plan(MODEL, cluster, many)
    limit = 0.8 * free.forecast.time_per_output_token_s
    kept = plan(MODEL, cluster, replace(many, tpot_limit_s=limit))
    assert kept.forecast.time_per_output_token_s <= limit
    assert kept.forecast.tokens_per_s <= free.forecast.tokens_per_s
    assert kept.max_num_seqs < free.max_num_seqs


@pytest.mark.parametrize("name", ["ttft_limit_s", "tpot_limit_s"])
def test_a_limit_that_nothing_keeps_is_refused_with_the_best_there_is(name: str) -> None:
    cluster = ClusterSpec.local(2, budget(32 * MIB), RATES, LINK)
    with pytest.raises(PlanError, match=rf"{name} is 1e-09 s and the least .* with TP") as caught:
        plan(MODEL, cluster, replace(USUAL, **{name: 1e-9}))
    had = float(str(caught.value).split("can be had ")[1].split(" s,")[0])
    made = plan(MODEL, cluster, replace(USUAL, **{name: 1.01 * had}))
    forecast = made.forecast
    kept = {
        "ttft_limit_s": forecast.time_to_first_token_s,
        "tpot_limit_s": forecast.time_per_output_token_s,
    }
    assert kept[name] <= 1.01 * had


def test_a_limit_that_is_no_time_is_refused() -> None:
    with pytest.raises(PlanError, match="tpot_limit_s is 0; it must be above 0"):
        Workload(tpot_limit_s=0)


def test_runners_up_differ_and_fall() -> None:
    best = plan(MODEL, UNEQUAL, USUAL)
    others = runners_up(MODEL, UNEQUAL, USUAL)
    rates = [made.forecast.tokens_per_s for made in (best, *others)]
    assert rates == sorted(rates, reverse=True)
    assert len(others) == 5
