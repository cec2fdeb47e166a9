"""All candidates for a plan, the most promising first, each looked at no closer than needed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from kvcache.layout import DTYPE_BYTES
from kvcache.tier import TierBudget
from partition.assembly import Assembly
from partition.cluster import ClusterSpec
from partition.cost import CostModel, PassShape
from partition.device_pool import DevicePool, Sequence
from partition.errors import PlanError
from partition.layer_split import chain_times
from partition.layout_search import Layout, LayoutSearch, Solution
from partition.plan import PartitionPlan
from partition.profile import ModelProfile
from partition.scoring import Score, Scoring
from partition.sizing import (
    MIN_BATCHED_TOKENS,
    Sizing,
    batch_size,
    check_constraints,
    least_sizing,
    sizings,
)
from partition.stage_orders import StageOrders, stage_orders
from partition.stage_table import StageTable
from partition.stage_times import StageTimes
from partition.tier_choice import TierChoice, TierProblem
from partition.workload import Constraints, Objective, Workload

EVEN_ABOVE = 8
"""Above this many ranks a stage is split only so that each has as many heads, unless the user says
otherwise: the others are hardly better than one of these, and many."""
COARSE_STEPS = 2
"""A coarse bound counts as few tokens as a power of 2^this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout and sizing, ``bounded`` by those of many; then with ``search`` its times, with
    ``sequence`` its devices, with ``solution`` all of it."""

    layout: Layout
    sizing: Sizing
    bounded: bool = False
    search: LayoutSearch | None = None
    sequence: Sequence | None = None
    solution: Solution | None = None


@dataclass(slots=True)
class _Heap:
    """Candidates by their best possible score; solved ones first among equals."""

    scoring: Scoring
    items: list[tuple[Score, bool, int, Candidate]] = field(default_factory=list)
    pushed: int = 0

    def push(self, candidate: Candidate, cycle_s: float) -> None:
        """Add a candidate whose cycle is no shorter than this, unless it can be no plan."""
        score = self.scoring.score(candidate.layout, candidate.sizing, cycle_s)
        if score is not None:
            self.pushed += 1
            key = tuple(-value for value in score)
            item = (key, candidate.solution is None, self.pushed, candidate)
            heapq.heappush(self.items, item)

    def pop(self) -> Candidate:
        return heapq.heappop(self.items)[-1]


class PlanQueue:
    """One planning problem. Holds what its candidates share: stage tables, times and solved tier
    problems.

    A branch and bound, best first (Land and Doig, 1960): a candidate is popped with a bound that
    none of its plans exceeds, made more definite, and put back with the tighter bound; one that
    is popped when all of it is decided is the best of all that are left.
    """

    def __init__(
        self,
        profile: ModelProfile,
        cluster: ClusterSpec,
        workload: Workload,
        objective: Objective,
        constraints: Constraints,
    ) -> None:
        check_constraints(profile, constraints)
        if constraints.layer_split is not None:
            constraints = replace(constraints, pipeline_parallel=len(constraints.layer_split))
        self._profile = profile
        self._cluster = cluster
        self._workload = workload
        self._constraints = constraints
        self._scoring = Scoring(objective=objective, workload=workload)
        self._pool = DevicePool(cluster)
        self._rates = {device.bandwidths for node in cluster.nodes for device in node.devices}
        self._tables: dict[tuple[int, bool], StageTable] = {}
        self._tiers: dict[TierProblem, TierChoice | None] = {}
        self._times: dict[object, StageTimes] = {}
        self._orders: dict[tuple[int, int], StageOrders] = {}
        self._chains: dict[object, list[float]] = {}
        self._check_devices()

    def over(self, cluster: ClusterSpec) -> PlanQueue:
        """The same problem on another cluster; shares the tables."""
        other = PlanQueue(
            self._profile, cluster, self._workload, self._scoring.objective, self._constraints
        )
        other._tables = self._tables
        return other

    def ranked(self, model: str, count: int) -> tuple[PartitionPlan, ...]:
        """The ``count`` best plans of distinct layouts or device orders, best first."""
        for candidates in (self._candidates(), self._least_candidates()):
            best: dict[object, PartitionPlan] = {}
            for candidate in self._solved(candidates):
                made = self._assemble(candidate, model)
                if self._scoring.keeps_limits(made.forecast):
                    assert candidate.solution is not None
                    best.setdefault((candidate.layout, candidate.solution.numbers), made)
                if len(best) == count:
                    break
            if best:
                return tuple(best.values())
        return ()

    def fits(self) -> bool:
        """Whether any plan exists: with the least sizing, in any layout."""
        return next(self._solved(self._least_candidates()), None) is not None

    def _solved(self, candidates: Iterator[tuple[Layout, Sizing]]) -> Iterator[Candidate]:
        """The candidates with their solutions, best first; each device order of each."""
        heap = _Heap(self._scoring)
        for layout, sizing in candidates:
            bound = self._first_bound(layout, sizing, coarse=True)
            heap.push(Candidate(layout=layout, sizing=sizing), bound)
        while heap.items:
            candidate = heap.pop()
            layout, sizing, search = candidate.layout, candidate.sizing, candidate.search
            if candidate.solution is not None:
                yield candidate
            elif not candidate.bounded:
                bound = self._first_bound(layout, sizing)
                heap.push(Candidate(layout=layout, sizing=sizing, bounded=True), bound)
            elif search is None:
                search = self._search(layout, sizing)
                opened = Candidate(layout=layout, sizing=sizing, bounded=True, search=search)
                heap.push(opened, search.bound())
            elif candidate.sequence is None:
                for bound, sequence in search.expand(self._stage_orders(layout)):
                    heap.push(replace(candidate, sequence=sequence), bound)
            else:
                cycle, solution = search.refine(candidate.sequence)
                heap.push(replace(candidate, solution=solution), cycle)

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

    def _layouts(self) -> Iterator[Layout]:
        fixed = self._constraints
        num_devices = self._cluster.num_devices
        for tensor in range(1, num_devices + 1):
            if fixed.tensor_parallel not in (None, tensor):
                continue
            uneven = self._profile.heads.query % tensor != 0
            if fixed.tensor_parallel is None and tensor > EVEN_ABOVE and uneven:
                continue
            if self._profile.why_not_tensor_parallel(tensor) is not None:
                continue
            for expert in (False, True):
                if fixed.expert_parallel not in (None, expert):
                    continue
                if expert and self._profile.why_not_expert_parallel(tensor) is not None:
                    continue
                for pipeline in range(1, min(num_devices // tensor, self._profile.num_layers) + 1):
                    if fixed.pipeline_parallel not in (None, pipeline):
                        continue
                    for in_turn in (False, True)[: min(pipeline, 2)]:
                        yield Layout(
                            tensor_parallel=tensor,
                            pipeline_parallel=pipeline,
                            expert_parallel=expert,
                            in_turn=in_turn,
                        )

    def _candidates(self) -> Iterator[tuple[Layout, Sizing]]:
        budgets = [device.budget for node in self._cluster.nodes for device in node.devices]
        least = TierBudget(
            device_bytes=0,
            host_bytes=min(budget.host_bytes for budget in budgets),
            nvme_bytes=min(budget.nvme_bytes for budget in budgets),
        )
        sizes = sorted({budget.device_bytes for budget in budgets}, reverse=True)
        known: dict[tuple[int, int], dict[Sizing, None]] = {}
        for layout in self._layouts():
            key = self._table(layout).width, layout.pipeline_parallel
            if key not in known:
                known[key] = {
                    sizing: None
                    for device_bytes in sizes
                    for sizing in sizings(
                        self._profile,
                        replace(least, device_bytes=device_bytes),
                        *key,
                        self._workload,
                        self._constraints,
                    )
                }
            for sizing in known[key]:
                if self._may_run(layout, sizing) and self._may_pay(sizing):
                    yield layout, sizing

    def _least_candidates(self) -> Iterator[tuple[Layout, Sizing]]:
        for layout in self._layouts():
            sizing = least_sizing(self._profile, self._table(layout).width, self._constraints)
            if self._may_run(layout, sizing):
                yield layout, sizing

    def _may_run(self, layout: Layout, sizing: Sizing) -> bool:
        """Whether each pass in flight has a sequence."""
        return layout.passes_in_flight <= batch_size(sizing, self._workload)

    def _may_pay(self, sizing: Sizing) -> bool:
        """Whether to attend on the host, or not to, can be better than the other."""
        if not sizing.num_rotating_host_blocks or sizing.kv_storage_dtype != "auto":
            return True
        if sizing.attends_on_host:
            return all(rates.attention_on_host is not None for rates in self._rates)
        return any(rates.copies_overlap for rates in self._rates)

    def _table(self, layout: Layout) -> StageTable:
        key = layout.tensor_parallel, layout.expert_parallel
        if key not in self._tables:
            self._tables[key] = StageTable(self._profile, *key)
        return self._tables[key]

    def _costs(self, layout: Layout) -> CostModel:
        return CostModel(
            profile=self._profile,
            tensor_parallel=layout.tensor_parallel,
            activation_bytes=DTYPE_BYTES[self._profile.dtype],
        )

    def _stage_times(self, layout: Layout, sizing: Sizing, shape: PassShape) -> StageTimes:
        key = layout.tensor_parallel, layout.expert_parallel, sizing, shape
        if key not in self._times:
            self._times[key] = StageTimes(
                self._table(layout),
                self._costs(layout),
                sizing,
                self._constraints.block_size,
                shape,
                self._tiers,
                self._constraints.layer_split,
            )
        return self._times[key]

    def _search(self, layout: Layout, sizing: Sizing) -> LayoutSearch:
        shape = self._scoring.shape(layout, sizing)
        return LayoutSearch(
            layout=layout, pool=self._pool, times=self._stage_times(layout, sizing, shape)
        )

    def _stage_orders(self, layout: Layout) -> StageOrders:
        key = layout.tensor_parallel, layout.pipeline_parallel
        if key not in self._orders:
            self._orders[key] = stage_orders(self._pool, *key)
        return self._orders[key]

    def _first_bound(self, layout: Layout, sizing: Sizing, *, coarse: bool = False) -> float:
        """A cheap lower bound of the cycle, shared by many candidates: every stage on the best
        group of devices, with the least KV and no more tokens than the pass has. ``coarse``: shared
        by more of them, with far fewer tokens, no context and no KV that rotates."""
        shape = self._scoring.shape(layout, sizing)
        steps = COARSE_STEPS if coarse else 1
        num_tokens = _power_of_two(shape.num_tokens, steps)
        num_sequences = _power_of_two(shape.num_sequences, steps)
        if coarse:
            shape = PassShape(num_tokens=num_tokens, num_sequences=num_sequences, context=0.0)
        else:
            shape = replace(shape, num_tokens=num_tokens, num_sequences=num_sequences)
        groups, _ = self._pool.groups(layout.tensor_parallel, layout.pipeline_parallel)
        if not groups:
            return math.inf
        parallel = layout.tensor_parallel, layout.expert_parallel
        key = (*parallel, groups, shape, layout.in_turn)
        if key not in self._chains:
            asked = self._constraints.max_num_batched_tokens or MIN_BATCHED_TOKENS
            smallest = replace(
                self._constraints, max_num_batched_tokens=min(asked, MIN_BATCHED_TOKENS)
            )
            least = least_sizing(self._profile, self._table(layout).width, smallest)
            times = self._stage_times(layout, least, shape)
            numbers = {self._pool.alone(group) for group in groups}
            tables = [times.times(number, self._pool.stages[number]) for number in numbers]
            longest = min(
                self._cluster.num_devices // layout.tensor_parallel, self._profile.num_layers
            )
            self._chains[key] = chain_times(np.min(tables, axis=0), longest, layout.in_turn)
        return self._chains[key][layout.pipeline_parallel - 1]

    def _assemble(self, candidate: Candidate, model: str) -> PartitionPlan:
        assert candidate.solution is not None
        assembly = Assembly(
            model=model or self._profile.architecture,
            layout=candidate.layout,
            pool=self._pool,
            table=self._table(candidate.layout),
            costs=self._costs(candidate.layout),
            sizing=candidate.sizing,
            workload=self._workload,
            constraints=self._constraints,
        )
        return assembly.plan(candidate.solution)


def _power_of_two(number: int, steps: int) -> int:
    """The largest power of 2^steps that is no larger."""
    return 1 << (number.bit_length() - 1) // steps * steps
