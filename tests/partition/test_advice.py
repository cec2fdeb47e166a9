from __future__ import annotations

import pytest
from planner_models import LINK, RATES, budget, llama_like

from partition import ClusterSpec, Constraints, Objective, Workload, plan, runners_up
from partition.advice import explain_runners_up, what_would_change

MIB = 1 << 20
MODEL = llama_like(num_layers=8, hidden=256, inter=1024)
USUAL = Workload(prompt_tokens=16, output_tokens=16, concurrency=4)
STREAMED = ClusterSpec.local(2, budget(4 * MIB, 0, 64 * MIB), RATES, LINK, shared=("disk",))


def test_what_binds_is_what_would_change_the_answer() -> None:
    best = plan(MODEL, STREAMED, USUAL)
    assert best.forecast.binds == "disk"
    changes = what_would_change(best, MODEL, STREAMED, USUAL)
    factors = {change.what: change.factor for change in changes}
    assert list(factors.values()) == sorted(factors.values(), reverse=True)
    assert factors["2x disk bandwidth"] == pytest.approx(2, rel=0.01)
    assert factors["16 GiB more host memory per node"] > 2
    assert factors["2x as many sequences at once"] > 1.5
    assert "2x host memory" not in factors  # there is none
    assert str(changes[-1]) == f"{changes[-1].what}: {changes[-1].factor:.2g}x"


def test_nothing_worth_saying_is_not_said() -> None:
    ample = ClusterSpec.local(1, budget(64 * MIB), RATES, LINK)
    fixed = Constraints(tensor_parallel=1, pipeline_parallel=1)
    best = plan(MODEL, ample, USUAL, constraints=fixed)
    changes = what_would_change(best, MODEL, ample, USUAL, constraints=fixed)
    assert {change.what for change in changes} <= {"2x as many sequences at once"}


def test_runners_up_are_told_what_they_wait_for_and_with_whom() -> None:
    best = plan(MODEL, STREAMED, USUAL)
    others = runners_up(MODEL, STREAMED, USUAL)
    told = explain_runners_up(best, others, STREAMED)
    assert [each.plan for each in told] == list(others)
    assert all(each.factor <= 1 for each in told)
    whys = [each.why for each in told if each.plan.passes_in_flight == 2]
    assert whys and all("disk" in why and "2 devices of local share" in why for why in whys)


def test_with_least_devices_the_others_have_more() -> None:
    ample = ClusterSpec.local(2, budget(64 * MIB), RATES, LINK)
    goal = Objective.LEAST_DEVICES
    best = plan(MODEL, ample, USUAL, goal)
    told = explain_runners_up(best, runners_up(MODEL, ample, USUAL, goal), ample, goal)
    assert {each.why for each in told} == {"2 devices instead of 1"}
