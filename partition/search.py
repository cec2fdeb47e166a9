"""The planner: the best PartitionPlan for a model, a cluster, a workload and an objective."""

from __future__ import annotations

from partition.cluster import ClusterSpec
from partition.errors import PlanError
from partition.plan import PartitionPlan
from partition.plan_queue import PlanQueue
from partition.profile import ModelProfile
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
        raise _limit_refusal(profile, cluster, workload, constraints, model)
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


def _limit_refusal(
    profile: ModelProfile,
    cluster: ClusterSpec,
    workload: Workload,
    constraints: Constraints,
    model: str,
) -> PlanError:
    """The error to raise when no plan keeps the limits: the best that can be had, and how. Raises
    BudgetError where nothing fits at all."""
    alone = Workload(
        prompt_tokens=workload.prompt_tokens, output_tokens=workload.output_tokens, concurrency=1
    )
    best = {
        "ttft_limit_s": plan(profile, cluster, alone, Objective.MIN_TTFT, constraints, model=model),
        "tpot_limit_s": plan(profile, cluster, alone, Objective.MIN_TPOT, constraints, model=model),
    }
    had = {
        "ttft_limit_s": best["ttft_limit_s"].forecast.time_to_first_token_s,
        "tpot_limit_s": best["tpot_limit_s"].forecast.time_per_output_token_s,
    }
    missed = [
        f"{name} is {getattr(workload, name)} s; the best that can be had is {had[name]:.3g} s, "
        f"with {best[name].reason}"
        for name in had
        if getattr(workload, name) is not None
    ]
    beyond = [
        line
        for name, line in zip(
            (name for name in had if getattr(workload, name) is not None), missed, strict=True
        )
        if had[name] > getattr(workload, name)
    ]
    if beyond:
        return PlanError("no plan keeps the limits: " + "; and ".join(beyond) + "; raise the limit")
    return PlanError(
        "no plan keeps both limits: " + "; and ".join(missed) + "; raise one of the limits"
    )
