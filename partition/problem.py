"""One question to the planner: a model, a cluster, a workload, an objective and what is fixed."""

from __future__ import annotations

from dataclasses import dataclass

from partition.cluster import ClusterSpec
from partition.plan import PartitionPlan
from partition.profile import ModelProfile
from partition.search import plan, runners_up
from partition.workload import Constraints, Objective, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningProblem:
    """``model`` is the name or path that the plans carry."""

    model: str
    profile: ModelProfile
    cluster: ClusterSpec
    workload: Workload
    objective: Objective
    constraints: Constraints

    def plan(self) -> PartitionPlan:
        """The best plan. Raises what `partition.plan` raises."""
        return plan(
            self.profile,
            self.cluster,
            self.workload,
            self.objective,
            self.constraints,
            model=self.model,
        )

    def runners_up(self, count: int = 5) -> tuple[PartitionPlan, ...]:
        """The next best plans, best first."""
        return runners_up(
            self.profile,
            self.cluster,
            self.workload,
            self.objective,
            self.constraints,
            model=self.model,
            count=count,
        )
