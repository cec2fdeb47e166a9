"""The best layer split and tiers for one TP x PP layout of one sizing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partition.cluster import DeviceSpec, StageDevices
from partition.cost import (
    PAGE_BYTES,
    CostModel,
    Load,
    PassShape,
    compute_time,
    pass_time,
)
from partition.layer_split import Split, split_layers
from partition.sizing import Sizing
from partition.stage_table import StageTable
from partition.tier_choice import TierChoice, TierProblem, choose_tiers


class Room(NamedTuple):
    """Bytes for weights on each tier of one rank, after KV, workspace and small units, and the
    largest device room with which KV keeps to its share while weights stream. Arrays as in
    `Load`."""

    device: NDArray[np.float64]
    host: NDArray[np.float64]
    nvme: NDArray[np.float64]
    may_stream: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A split with the tiers of every shard (by stage, then rank) and the stages' decode pass
    times."""

    split: Split
    choices: tuple[tuple[TierChoice, ...], ...]
    stage_times: tuple[float, ...]


class LayoutSearch:
    """Solves one (tensor parallel, pipeline parallel, sizing). ``tiers`` caches solved tier
    problems and is shared between searches."""

    def __init__(
        self,
        table: StageTable,
        costs: CostModel,
        stage_devices: tuple[StageDevices, ...],
        sizing: Sizing,
        block_size: int,
        decode: PassShape,
        tiers: dict[TierProblem, TierChoice | None],
    ) -> None:
        self._table = table
        self._costs = costs
        self._sizing = sizing
        self._block_size = block_size
        self._decode = decode
        self._tiers = tiers
        self.stage_devices = stage_devices
        self._bounds = {held: self._lower_bounds(held) for held in set(stage_devices)}

    def bound(self) -> float:
        """A lower bound on the slowest stage's decode pass, in seconds; inf where nothing can
        fit."""
        split = split_layers([self._bounds[held] for held in self.stage_devices])
        if split is None:
            return float("inf")
        return max(
            float(self._bounds[held][run])
            for held, run in zip(self.stage_devices, split, strict=True)
        )

    def solve(self) -> Solution | None:
        """The optimum: split by lower bounds, price the chosen stages exactly, and repeat until the
        split stands on exact prices alone. None: nothing fits."""
        times = {held: bounds.copy() for held, bounds in self._bounds.items()}
        solved: dict[tuple[StageDevices, int], float] = {}
        groups = self._table.stage_groups
        while True:
            split = split_layers([times[held] for held in self.stage_devices])
            if split is None:
                return None
            open_stages = {
                (held, int(groups[run])): run
                for held, run in zip(self.stage_devices, split, strict=True)
                if (held, int(groups[run])) not in solved
            }
            if not open_stages:
                break
            for (held, group), run in open_stages.items():
                solved[held, group] = self.stage_time(held, run)
                times[held][groups == group] = solved[held, group]
        choices = tuple(
            tuple(choice for choice in self._stage_choices(held, run) if choice is not None)
            for held, run in zip(self.stage_devices, split, strict=True)
        )
        stage_times = tuple(
            float(times[held][run]) for held, run in zip(self.stage_devices, split, strict=True)
        )
        return Solution(split=split, choices=choices, stage_times=stage_times)

    def stage_time(self, held: StageDevices, run: tuple[int, int]) -> float:
        """Seconds of a decode pass on the run [first, end); inf: it does not fit."""
        slowest = 0.0
        for rank, choice in enumerate(self._stage_choices(held, run)):
            if choice is None:
                return float("inf")
            load = self._table.loads[rank].at(*run)
            terms = self._costs.terms(
                load,
                self._decode,
                held.devices[rank].bandwidths,
                choice.streamed_bytes,
                choice.disk_bytes,
                group_link=held.group_link,
                next_link=held.next_link,
            )
            slowest = max(slowest, float(pass_time(terms)))
        return slowest

    def _stage_choices(
        self, held: StageDevices, run: tuple[int, int]
    ) -> Iterator[TierChoice | None]:
        units = self._table.profile.stage_units(*run)
        for rank, device in enumerate(held.devices):
            load = self._table.loads[rank].at(*run)
            problem = self._tier_problem(rank, held, load, self._table.stream_classes(units, rank))
            if problem not in self._tiers:
                self._tiers[problem] = choose_tiers(problem)
            choice = self._tiers[problem]
            room = self._room(rank, load, device)
            if choice is not None and choice.streamed_bytes and not room.may_stream:
                choice = None
            yield choice

    def _tier_problem(
        self, rank: int, held: StageDevices, load: Load, classes: tuple[tuple[int, int], ...]
    ) -> TierProblem:
        device = held.devices[rank]
        room = self._room(rank, load, device)
        terms = self._costs.terms(
            load,
            self._decode,
            device.bandwidths,
            group_link=held.group_link,
            next_link=held.next_link,
        )
        return TierProblem(
            classes=classes,
            embedding=int(load.embedding_bytes),
            device_bytes=int(room.device),
            host_bytes=int(room.host),
            nvme_bytes=int(room.nvme),
            floor_s=float(compute_time(terms)),
            host_link=device.bandwidths.host_to_device,
            disk=device.bandwidths.disk_read,
            staged=device.staged,
        )

    def _room(self, rank: int, load: Load, device: DeviceSpec) -> Room:
        sizing, budget = self._sizing, device.budget
        block_bytes = load.kv_bytes_per_token * self._block_size
        left = budget.device_bytes - sizing.workspace_bytes - load.small_bytes
        kv = _pages(sizing.num_device_blocks * block_bytes)
        within_share = np.asarray(kv >= 0)
        if sizing.kv_share is not None:
            within_share = kv <= sizing.kv_share * (left - self._table.longest_ring_bytes(rank))
        return Room(
            device=np.asarray(left - kv),
            host=np.asarray(budget.host_bytes - _pages(sizing.num_host_blocks * block_bytes)),
            nvme=np.full_like(kv, budget.nvme_bytes),
            may_stream=within_share,
        )

    def _lower_bounds(self, held: StageDevices) -> NDArray[np.float64]:
        """[first, end]: no stage time is below these. Units are taken as divisible, the ring as two
        of the smallest; a stage that fits its device is exact."""
        bounds = np.zeros_like(self._table.loads[0].num_layers)
        for rank, device in enumerate(held.devices):
            load = self._table.loads[rank]
            room = self._room(rank, load, device)
            resident = load.stream_bytes <= room.device
            streamed = np.where(resident, 0.0, load.stream_bytes - room.device)
            on_disk = np.maximum(0.0, streamed - room.host)
            terms = self._costs.terms(
                load,
                self._decode,
                device.bandwidths,
                streamed,
                on_disk,
                group_link=held.group_link,
                next_link=held.next_link,
            )
            fits = (room.device >= 0) & (room.host >= 0)
            fits &= load.stream_bytes + load.embedding_bytes <= room.device + room.host + room.nvme
            fits &= resident | room.may_stream
            bounds = np.maximum(bounds, np.where(fits, pass_time(terms), np.inf))
        bounds[np.tril_indices_from(bounds)] = np.inf
        return bounds


def _pages(num_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.ceil(num_bytes / PAGE_BYTES) * PAGE_BYTES)
