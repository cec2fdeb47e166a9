"""All that is told of a plan, whoever tells it: the plan, its memory, its pass and its rivals."""

from __future__ import annotations

from dataclasses import dataclass

from partition.advice import Change, RunnerUp, explain_runners_up, what_would_change
from partition.memory_use import MemoryUse, memory_use
from partition.pass_work import PassWork, pass_work
from partition.plan import PartitionPlan
from partition.problem import PlanningProblem
from partition.timeline import Timeline, timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan and what follows from it. ``uses`` are by rank, then tier."""

    problem: PlanningProblem
    plan: PartitionPlan
    uses: tuple[MemoryUse, ...]
    work: PassWork
    timeline: Timeline
    runners_up: tuple[RunnerUp, ...]
    changes: tuple[Change, ...]


def plan_report(problem: PlanningProblem) -> PlanReport:
    """Plan, and explain the plan. Raises what the planner raises."""
    plan = problem.plan()
    work = pass_work(plan, problem)
    return PlanReport(
        problem=problem,
        plan=plan,
        uses=memory_use(plan, problem.profile),
        work=work,
        timeline=timeline(work),
        runners_up=explain_runners_up(
            plan, problem.runners_up(), problem.cluster, problem.objective
        ),
        changes=what_would_change(
            plan,
            problem.profile,
            problem.cluster,
            problem.workload,
            problem.objective,
            problem.constraints,
        ),
    )


def layout(plan: PartitionPlan) -> str:
    """How the model is cut."""
    experts = ", experts dealt whole" if plan.expert_parallel else ""
    passes = f", {plan.passes_in_flight} passes in flight" if plan.pipeline_parallel > 1 else ""
    passes = passes.replace("1 passes", "1 pass")
    return f"TP {plan.tensor_parallel} x PP {plan.pipeline_parallel}{experts}{passes}"
