"""The planner: the best PartitionPlan for a model, a cluster, a workload and an objective."""

from __future__ import annotations

from dataclasses import replace

from partition.cluster import ClusterSpec
from partition.errors import PlanError
from partition.plan import PartitionPlan
from partition.plan_queue import PlanQueue
from partition.profile import ModelProfile
from partition.scoring import Scoring
from partition.smallest_budget import budget_refusal
from partition.workload import Constraints, Objective, Workload


def plan(
    profile: ModelProfile,
    cluster: ClusterSpec,
    workload: Workload | None = None,
    objective: Objective = Objective.MAX_THROUGHPUT,
    constraints: Constraints | None = None,
    *,
    model: str = "",
) -> PartitionPlan:
    """The best plan under the cost model. ``model`` is the name or path that the plan carries.

    Raises BudgetError naming the smallest budgets that would fit, and PlanError where the
    constraints contradict the model or no plan keeps the workload's limits.
    """
    workload, constraints = workload or Workload(), constraints or Constraints()
    queue = PlanQueue(profile, cluster, workload, objective, constraints)
    best = next(iter(queue.ranked(model, 1)), None)
    if best is not None:
        return best
    if workload != workload.unlimited:
        return _within_limits(profile, cluster, workload, constraints, model)
    raise budget_refusal(profile, cluster, lambda raised: queue.over(raised).fits())


def runners_up(
    profile: ModelProfile,
    cluster: ClusterSpec,
    workload: Workload | None = None,
    objective: Objective = Objective.MAX_THROUGHPUT,
    constraints: Constraints | None = None,
    *,
    model: str = "",
    count: int = 5,
) -> tuple[PartitionPlan, ...]:
    """The next best plans after `plan`'s, best first: they differ in TP, PP, EP, passes in flight
    or the order of their devices."""
    workload, constraints = workload or Workload(), constraints or Constraints()
    queue = PlanQueue(profile, cluster, workload, objective, constraints)
    return queue.ranked(model, count + 1)[1:]


def _within_limits(
    profile: ModelProfile,
    cluster: ClusterSpec,
    workload: Workload,
    constraints: Constraints,
    model: str,
) -> PartitionPlan:
    """The plan with the soonest first token, or the fastest for a sequence alone, where it keeps
    the limits that the best plans do not.

    Raises PlanError naming the limits, the best that can be had and the plan that has it, and
    BudgetError where nothing fits at all.
    """
    alone = replace(workload.unlimited, concurrency=1)
    goals = {"ttft_limit_s": Objective.MIN_TTFT, "tpot_limit_s": Objective.MIN_TPOT}
    missed = []
    for name, objective in goals.items():
        best = plan(profile, cluster, alone, objective, constraints, model=model)
        if Scoring(objective=objective, workload=workload).keeps_limits(best.forecast):
            return best
        had = {
            "ttft_limit_s": best.forecast.time_to_first_token_s,
            "tpot_limit_s": best.forecast.time_per_output_token_s,
        }
        limit = getattr(workload, name)
        if limit is not None:
            missed.append(
                f"{name} is {limit:g} s and the least that can be had {had[name]:.3g} s, with "
                f"{best.reason}"
            )
    raise PlanError(f"no plan keeps the limits; raise them: {'; '.join(missed)}")
