"""The best devices, layer split and tiers for one layout of one sizing, found from lower bounds
on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partition.device_pool import DevicePool, Sequence
from partition.layer_split import Split, cut_time, cut_times, split_layers
from partition.stage_orders import StageOrders, neighbours
from partition.stage_times import StageTimes
from partition.tier_choice import TierChoice

MAX_NEIGHBOURS = 64
"""How many sequences around a good one are looked at, where not all can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How ranks and passes are arranged. ``in_turn``: as many passes as stages, each with its part
    of the batch; else one with all of it."""

    tensor_parallel: int
    pipeline_parallel: int
    expert_parallel: bool
    in_turn: bool

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def passes_in_flight(self) -> int:
        return self.pipeline_parallel if self.in_turn else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Devices and layers by stage, and the tiers of every shard (by stage, then rank)."""

    sequence: Sequence
    numbers: tuple[int, ...]
    split: Split
    choices: tuple[tuple[TierChoice, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSearch:
    """One layout with the times of one sizing, which other layouts may share."""

    layout: Layout
    pool: DevicePool
    times: StageTimes

    def bound(self) -> float:
        """No cycle is shorter: as if each stage had the best group of devices alone; inf: nothing
        fits."""
        groups, _ = self.pool.groups(self.layout.tensor_parallel, self.layout.pipeline_parallel)
        numbers = {self.pool.alone(group) for group in groups}
        best = np.min([self._table(number) for number in numbers], axis=0)
        same = np.zeros((1, self.layout.pipeline_parallel), dtype=np.int64)
        return float(cut_times(best[None], same, self.layout.in_turn)[0])

    def expand(self, orders: StageOrders) -> list[tuple[float, Sequence]]:
        """The sequences that may fit, each with a lower bound of its cycle."""
        if not orders.sequences:
            return []
        best = self._bounds(orders.sequences)
        if not orders.complete and np.isfinite(best).any():
            around = neighbours(self.pool, orders.sequences[int(np.argmin(best))], MAX_NEIGHBOURS)
            orders = StageOrders(sequences=(*orders.sequences, *around), complete=False)
            best = np.append(best, self._bounds(tuple(around)))
        distinct: dict[tuple[int, ...], tuple[float, Sequence]] = {}
        for bound, sequence in zip(best, orders.sequences, strict=True):
            if np.isfinite(bound):
                numbers = self.pool.number(sequence, self.layout.in_turn)
                distinct.setdefault(numbers, (float(bound), sequence))
        return list(distinct.values())

    def refine(self, sequence: Sequence) -> tuple[float, Solution | None]:
        """A lower bound of the sequence's cycle, with the solution that has it where it is exact;
        else the stages that it stands on have been priced, so that the next bound is better."""
        numbers = self.pool.number(sequence, self.layout.in_turn)
        tables = {number: self._table(number) for number in numbers}
        split = split_layers([tables[number] for number in numbers], self.layout.in_turn)
        if split is None:
            return float("inf"), None
        stages = list(zip(numbers, split, strict=True))
        cycle = cut_time(
            [float(tables[number][run]) for number, run in stages], self.layout.in_turn
        )
        open_stages = [
            (number, run) for number, run in stages if not self.times.is_exact(number, run)
        ]
        for number, run in open_stages:
            self.times.price(number, self.pool.stages[number], run)
        if open_stages:
            return cycle, None
        choices = tuple(
            tuple(
                choice
                for choice in self.times.choices(self.pool.stages[number], run)
                if choice is not None
            )
            for number, run in stages
        )
        return cycle, Solution(sequence=sequence, numbers=numbers, split=split, choices=choices)

    def _table(self, number: int) -> NDArray[np.float64]:
        return self.times.times(number, self.pool.stages[number])

    def _bounds(self, sequences: tuple[Sequence, ...]) -> NDArray[np.float64]:
        if not sequences:
            return np.zeros(0)
        numbers = np.array([self.pool.number(each, self.layout.in_turn) for each in sequences])
        distinct, places = np.unique(numbers, return_inverse=True)
        tables = np.stack([self._table(int(number)) for number in distinct])
        return cut_times(tables, places.reshape(numbers.shape), self.layout.in_turn)
