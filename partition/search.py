"""The planner: the best PartitionPlan for a model, a cluster, a workload and an objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcache.layout import DTYPE_BYTES
from partition.assembly import Assembly, batch_size, decode_shape
from partition.cluster import ClusterSpec
from partition.cost import CostModel
from partition.errors import PlanError
from partition.layout_search import LayoutSearch
from partition.plan import PartitionPlan
from partition.profile import ModelProfile
from partition.sizing import Sizing, check_constraints, least_sizing, sizings
from partition.smallest_budget import budget_refusal
from partition.stage_table import StageTable
from partition.tier_choice import TierChoice, TierProblem
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
    constraints contradict the model.
    """
    search = Search(
        profile, cluster, workload or Workload(), objective, constraints or Constraints()
    )
    best = next(iter(search.ranked(model, 1)), None)
    if best is not None:
        return best
    raise budget_refusal(profile, cluster, lambda raised: search.over(raised).fits())


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
    """The next best plans after `plan`'s, one per TP x PP layout, best first."""
    search = Search(
        profile, cluster, workload or Workload(), objective, constraints or Constraints()
    )
    return search.ranked(model, count + 1)[1:]


Score = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    bound: Score
    layout: tuple[int, int]
    sizing: Sizing
    search: LayoutSearch


class Search:
    """One planning problem. Holds the stage tables and solved tier problems that its candidates
    share."""

    def __init__(
        self,
        profile: ModelProfile,
        cluster: ClusterSpec,
        workload: Workload,
        objective: Objective,
        constraints: Constraints,
    ) -> None:
        check_constraints(profile, constraints)
        self._profile = profile
        self._cluster = cluster
        self._workload = workload
        self._objective = objective
        self._constraints = constraints
        self._tables: dict[int, StageTable] = {}
        self._tiers: dict[TierProblem, TierChoice | None] = {}
        self._check_devices()

    def over(self, cluster: ClusterSpec) -> Search:
        """The same problem on another cluster; shares the tables."""
        other = Search(self._profile, cluster, self._workload, self._objective, self._constraints)
        other._tables = self._tables
        return other

    def ranked(self, model: str, count: int) -> tuple[PartitionPlan, ...]:
        """The best plans of the ``count`` best layouts. Candidates are priced exactly from the best
        lower bound on, until the bounds of the rest cannot enter."""
        for candidates in (self._candidates(), self._least_candidates()):
            found: dict[tuple[int, int], tuple[Score, PartitionPlan]] = {}
            for candidate in sorted(candidates, key=lambda c: c.bound, reverse=True):
                scores = sorted((score for score, _ in found.values()), reverse=True)
                if len(scores) >= count and candidate.bound <= scores[count - 1]:
                    break
                priced = self._price(candidate, model)
                if priced is None:
                    continue
                known = found.get(candidate.layout)
                if known is None or priced[0] > known[0]:
                    found[candidate.layout] = priced
            if found:
                best = sorted(found.values(), key=lambda item: item[0], reverse=True)
                return tuple(plan for _, plan in best[:count])
        return ()

    def fits(self) -> bool:
        """Whether any plan exists: with the least sizing, in any layout."""
        return any(candidate.search.solve() is not None for candidate in self._least_candidates())

    def _layouts(self) -> Iterator[tuple[int, int]]:
        fixed = self._constraints
        num_devices = self._cluster.num_devices
        for tensor in range(1, num_devices + 1):
            if fixed.tensor_parallel not in (None, tensor):
                continue
            if self._why_not(tensor) is not None:
                continue
            for pipeline in range(1, min(num_devices // tensor, self._profile.num_layers) + 1):
                if fixed.pipeline_parallel in (None, pipeline):
                    yield tensor, pipeline

    def _why_not(self, tensor: int) -> str | None:
        if self._constraints.expert_parallel:
            return self._profile.why_not_expert_parallel(tensor)
        return self._profile.why_not_tensor_parallel(tensor)

    def _check_devices(self) -> None:
        fixed = self._constraints
        least_tensor = 2 if fixed.expert_parallel else 1
        tensor, pipeline = fixed.tensor_parallel or least_tensor, fixed.pipeline_parallel or 1
        if tensor * pipeline > self._cluster.num_devices:
            raise PlanError(
                f"tensor_parallel {tensor} x pipeline_parallel {pipeline} needs "
                f"{tensor * pipeline} devices, but the cluster has {self._cluster.num_devices}; "
                "lower one or add devices"
            )

    def _table(self, tensor: int) -> StageTable:
        if tensor not in self._tables:
            self._tables[tensor] = StageTable(
                self._profile, tensor, bool(self._constraints.expert_parallel)
            )
        return self._tables[tensor]

    def _candidates(self) -> Iterator[_Candidate]:
        for tensor, pipeline in self._layouts():
            table = self._table(tensor)
            devices = self._cluster.devices(tensor * pipeline)
            for sizing in sizings(
                self._profile, devices, table.width, pipeline, self._workload, self._constraints
            ):
                yield from self._candidate((tensor, pipeline), sizing)

    def _least_candidates(self) -> Iterator[_Candidate]:
        for tensor, pipeline in self._layouts():
            width = self._table(tensor).width
            sizing = least_sizing(self._profile, width, self._workload, self._constraints)
            yield from self._candidate((tensor, pipeline), sizing)

    def _candidate(self, layout: tuple[int, int], sizing: Sizing) -> Iterator[_Candidate]:
        """The candidate, unless its bound shows that it cannot fit."""
        tensor, pipeline = layout
        search = LayoutSearch(
            self._table(tensor),
            self._costs(layout),
            self._cluster.stages(tensor, pipeline),
            sizing,
            self._constraints.block_size,
            decode_shape(sizing, self._workload, pipeline),
            self._tiers,
        )
        slowest = search.bound()
        if slowest < float("inf"):
            passes = min(pipeline, batch_size(sizing, self._workload))
            bound = self._score(passes * slowest, sizing)
            yield _Candidate(bound=bound, layout=layout, sizing=sizing, search=search)

    def _costs(self, layout: tuple[int, int]) -> CostModel:
        return CostModel(
            profile=self._profile,
            tensor_parallel=layout[0],
            activation_bytes=DTYPE_BYTES[self._profile.dtype],
        )

    def _score(self, cycle_s: float, sizing: Sizing) -> Score:
        """Larger is better. For the least TPOT the whole concurrency must be served first."""
        batch = batch_size(sizing, self._workload)
        if self._objective is Objective.MIN_TPOT:
            return float(batch), -cycle_s
        return batch / max(cycle_s, 1e-12), float(sizing.num_device_blocks)

    def _price(self, candidate: _Candidate, model: str) -> tuple[Score, PartitionPlan] | None:
        solution = candidate.search.solve()
        if solution is None:
            return None
        assembly = Assembly(
            model=model or self._profile.architecture,
            table=self._table(candidate.layout[0]),
            costs=self._costs(candidate.layout),
            stage_devices=candidate.search.stage_devices,
            sizing=candidate.sizing,
            workload=self._workload,
            constraints=self._constraints,
        )
        plan = assembly.plan(solution)
        return self._score(plan.forecast.decode_pass_s, candidate.sizing), plan
