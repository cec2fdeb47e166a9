"""A pass played through: exact times of hand-made work, and the cost model's terms unit by unit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from planner_models import LINK, RATES, budget, llama_like

from kvcache.tier import Tier
from partition import ClusterSpec, Constraints, Objective, Workload
from partition.memory_use import memory_use, totals
from partition.pass_work import PassWork, StageWork, UnitWork, pass_work
from partition.problem import PlanningProblem
from partition.timeline import timeline

KIB = 1 << 10


def stage(*units: UnitWork, ring: int = 0, send_s: float = 0.0, number: int = 0) -> StageWork:
    return StageWork(
        stage=number, rank=number, ring_bytes=ring, overhead_s=0.0, send_s=send_s, units=units
    )


def unit(
    name: str,
    compute_s: float,
    disk_s: float = 0.0,
    link_s: float = 0.0,
    ring_bytes: int | None = None,
) -> UnitWork:
    return UnitWork(
        unit=name,
        tier=Tier.NVME if disk_s else Tier.DEVICE,
        disk_s=disk_s,
        host_link_s=link_s,
        compute_s=compute_s,
        collectives_s=0.0,
        ring_bytes=int(disk_s > 0) if ring_bytes is None else ring_bytes,
    )


def work(*stages: StageWork, passes: int = 1) -> PassWork:
    return PassWork(num_sequences=1, passes_in_flight=passes, stages=stages, moved_bytes={})


@pytest.mark.parametrize(("ring", "pass_s"), [(2, 6.0), (1, 12.0)])
def test_a_ring_of_two_keeps_the_disk_busy_and_a_ring_of_one_does_not(
    ring: int, pass_s: float
) -> None:
    units = [unit(name, 1.0, disk_s=2.0, link_s=1.0) for name in "abc"]
    made = timeline(work(stage(*units, ring=ring)))
    assert made.pass_s == pass_s
    reading = sum(e.end_s - e.start_s for e in made.events if e.lane == "disk")
    assert reading == 6.0
    shown = [e for e in made.events if e.lane == "compute" and not e.ahead]
    assert [e.unit for e in shown] == ["a", "b", "c"]
    assert all(e.end_s - e.start_s == 1.0 for e in shown)


def test_nothing_is_used_before_it_is_there_and_no_lane_does_two_things() -> None:
    units = [unit("a", 1.0), unit("b", 2.0, disk_s=3.0, link_s=0.5), unit("c", 0.5, 1.0, 1.0)]
    events = [e for e in timeline(work(stage(*units, ring=2))).events if not e.ahead]
    ends = {(e.lane, e.unit): e.end_s for e in events}
    starts = {(e.lane, e.unit): e.start_s for e in events}
    assert starts["compute", "b"] >= ends["host link", "b"] >= ends["disk", "b"]
    assert starts["disk", "c"] < starts["compute", "b"]
    for lane in ("disk", "host link", "compute"):
        spans = sorted((e.start_s, e.end_s) for e in events if e.lane == lane)
        assert all(left[1] <= right[0] for left, right in pairwise(spans))


def test_rotating_kv_of_units_that_stay_is_read_from_the_start_of_its_pass_on() -> None:
    units = [unit(name, 1.0, disk_s=3.0, link_s=0.5, ring_bytes=0) for name in "abc"]
    made = timeline(work(stage(*units)))
    assert made.pass_s == 3 * 3.0 + 0.5 + 1.0
    events = {(e.lane, e.unit): (e.start_s, e.end_s) for e in made.events if not e.ahead}
    assert [events["disk", name] for name in "abc"] == [(0.0, 3.0), (3.0, 6.0), (6.0, 9.0)]
    assert [events["compute", name] for name in "abc"] == [(3.5, 4.5), (6.5, 7.5), (9.5, 10.5)]
    kept_on_host = [unit(name, 1.0, link_s=2.0) for name in "ab"]
    assert timeline(work(stage(*kept_on_host))).pass_s == 5.0


def test_stages_work_on_passes_of_their_own() -> None:
    stages = stage(unit("a", 1.0), send_s=0.5), stage(unit("b", 1.0), number=1)
    alone = timeline(work(*stages))
    assert (alone.pass_s, alone.ranks) == (2.5, (0, 1))
    assert not any(event.ahead for event in alone.events)
    two = timeline(work(*stages, passes=2))
    assert two.pass_s == 2.5
    others = [(e.stage, e.unit, e.start_s, e.end_s) for e in two.events if e.ahead]
    assert (1, "b", 0.0, 1.0) in others  # the pass before, on the second stage
    assert (0, "a", 1.5, 2.5) in others  # the pass after, on the first


@pytest.fixture(scope="module")
def problem() -> PlanningProblem:
    device = budget(168 * KIB, 8 * KIB, 1 << 30)
    return PlanningProblem(
        model="m",
        profile=llama_like(num_layers=8),
        cluster=ClusterSpec.local(4, device, RATES, LINK),
        workload=Workload(prompt_tokens=16, output_tokens=16, concurrency=2),
        objective=Objective.MAX_THROUGHPUT,
        constraints=Constraints(tensor_parallel=2, pipeline_parallel=2, max_num_seqs=2),
    )


def test_the_units_add_up_to_the_forecast(problem: PlanningProblem) -> None:
    plan = problem.plan()
    made = pass_work(plan, problem)
    terms = plan.forecast.terms_s
    assert terms["disk"] > 0
    sums = [
        {
            "disk": sum(unit.disk_s for unit in each.units),
            "host link": sum(unit.host_link_s for unit in each.units),
            "collectives": sum(unit.collectives_s for unit in each.units) + each.send_s,
        }
        for each in made.stages
    ]
    named = {name: terms[name] for name in sums[0]}
    assert any(found == pytest.approx(named) for found in sums)
    assert made.moved_bytes["disk"] == sum(
        -(-placement.num_bytes // 4096) * 4096
        for shard in plan.shards
        for placement in shard.placements
        if placement.tier is Tier.NVME and placement.unit != "embedding"
    )
    shown = timeline(made)
    assert shown.pass_s >= max(each["disk"] for each in sums)
    computed = {e.unit for e in shown.events if e.lane == "compute" and not e.ahead}
    everything = {p.unit for shard in plan.shards for p in shard.placements}
    assert computed == everything - {"embedding"} | {"pass"}


def test_memory_adds_up_to_the_budgets(problem: PlanningProblem) -> None:
    plan = problem.plan()
    uses = memory_use(plan, problem.profile)
    assert len(uses) == len(plan.shards) * len(Tier)
    for use in uses:
        shard = plan.shards[use.rank]
        assert sum(use.parts.values()) == use.budget_bytes == shard.budget.of(use.tier)
        used = shard.used_bytes(use.tier)
        assert use.used_share == pytest.approx(used / use.budget_bytes)
    held = totals(uses)
    weights = ("embedding", "attention", "mlp", "small", "head")
    for tier in Tier:
        expected = sum(shard.weight_bytes(tier) for shard in plan.shards)
        assert sum(held[kind, tier] for kind in weights) == expected
    assert held["KV", Tier.DEVICE] == sum(shard.device_kv_bytes for shard in plan.shards)
