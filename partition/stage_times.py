"""What a decode pass takes on every possible stage, for any devices: lower bounds of all stages at
once, exact prices where they matter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partition.cluster import DeviceSpec, StageDevices
from partition.cost import PAGE_BYTES, CostModel, Load, PassShape, compute_time, pass_time
from partition.sizing import Sizing
from partition.stage_table import StageTable
from partition.tier_choice import TierChoice, TierProblem, UnitClass, choose_tiers

Run = tuple[int, int]


class Room(NamedTuple):
    """Bytes for weights on each tier of one rank, after KV, workspace and small units, and whether
    KV keeps to its share if weights stream. Arrays as in `Load`."""

    device: NDArray[np.float64]
    host: NDArray[np.float64]
    nvme: NDArray[np.float64]
    may_stream: NDArray[np.bool_]


class StageTimes:
    """Times of one pass (``decode``) with one sizing. ``tiers`` caches solved tier problems and is
    shared. Times start as lower bounds and are replaced by exact ones by `price`. Only the runs of
    ``layer_split`` are possible, where it is given."""

    def __init__(
        self,
        table: StageTable,
        costs: CostModel,
        sizing: Sizing,
        block_size: int,
        decode: PassShape,
        tiers: dict[TierProblem, TierChoice | None],
        layer_split: tuple[int, ...] | None = None,
    ) -> None:
        self.table = table
        self.costs = costs
        self.sizing = sizing
        self.decode = decode
        self._block_size = block_size
        self._allowed = None if layer_split is None else _runs_of(layer_split)
        self._tiers = tiers
        self._by_group: dict[int, NDArray[np.float64]] = {}
        self._ranks: dict[object, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}
        self._exact: dict[int, NDArray[np.bool_]] = {}

    def times(self, number: int, held: StageDevices) -> NDArray[np.float64]:
        """[first, end]: seconds of the stage on ``held``, whose number is ``number``; inf: it does
        not fit. Exact where priced or where all weights stay on the device, a lower bound
        elsewhere."""
        if number not in self._by_group:
            bounds, exact = self._lower_bounds(held)
            self._by_group[number] = np.append(bounds, np.inf)
            self._exact[number] = exact
        times = self._by_group[number][self.table.stage_groups]
        return np.asarray(times if self._allowed is None else times + self._allowed)

    def is_exact(self, number: int, run: Run) -> bool:
        return bool(self._exact[number][self.table.stage_groups[run]])

    def price(self, number: int, held: StageDevices, run: Run) -> None:
        """Make the time of this run, and of all made like it, exact."""
        group = int(self.table.stage_groups[run])
        self._by_group[number][group] = self.stage_time(held, run)
        self._exact[number][group] = True

    def stage_time(self, held: StageDevices, run: Run) -> float:
        """Seconds of the pass on the run [first, end); inf: it does not fit."""
        slowest = 0.0
        for rank, choice in enumerate(self.choices(held, run)):
            if choice is None:
                return float("inf")
            terms = self.costs.terms(
                self.table.loads[rank].at(*run),
                self.decode,
                held.devices[rank].bandwidths,
                choice.streamed_bytes,
                choice.disk_bytes,
                choice.streamed_experts,
                choice.disk_experts,
                group_link=held.group_link,
                next_link=held.next_link,
            )
            slowest = max(slowest, float(pass_time(terms)))
        return slowest

    def choices(self, held: StageDevices, run: Run) -> Iterator[TierChoice | None]:
        """By rank: the tiers of its units; None: they do not fit."""
        units = self.table.profile.stage_units(*run)
        known: dict[tuple[int, int], TierChoice | None] = {}
        for rank, device in enumerate(held.devices):
            key = id(self.table.loads[rank]), id(device)
            if key not in known:
                load = self.table.loads[rank].at(*run)
                classes = self.table.stream_classes(units, rank)
                known[key] = self._choice(rank, held, load, classes)
            yield known[key]

    def _choice(
        self, rank: int, held: StageDevices, load: Load, classes: tuple[UnitClass, ...]
    ) -> TierChoice | None:
        problem = self._tier_problem(rank, held, load, classes)
        if problem not in self._tiers:
            self._tiers[problem] = choose_tiers(problem)
        choice = self._tiers[problem]
        if choice is not None and choice.streamed_bytes:
            may_stream = self._room(rank, load, held.devices[rank]).may_stream
            if self.sizing.max_num_batched_tokens > self.sizing.max_slice_tokens:
                may_stream &= choice.ring_bytes >= self.table.slicing_ring_bytes(rank)
            return choice if may_stream else None
        return choice

    def _tier_problem(
        self, rank: int, held: StageDevices, load: Load, classes: tuple[UnitClass, ...]
    ) -> TierProblem:
        device = held.devices[rank]
        room = self._room(rank, load, device)
        terms = self.costs.terms(
            load,
            self.decode,
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
            routed_share=self.table.profile.streamed_expert_share(self.decode.num_tokens),
            expert_disk=device.bandwidths.disk_read_of(self.costs.expert_bytes),
        )

    def _room(self, rank: int, load: Load, device: DeviceSpec) -> Room:
        sizing, budget = self.sizing, device.budget
        block_bytes = load.kv_bytes_per_token * self._block_size
        stored_bytes = sizing.stored_bytes(block_bytes, load.num_layers)
        landing_bytes = sizing.landing_bytes if sizing.needs_landing(device.staged) else 0
        held = sizing.workspace_bytes + sizing.rotation_bytes
        left = budget.device_bytes - held - load.small_bytes
        kv = _pages(sizing.num_device_blocks * block_bytes)
        within_share = np.asarray(kv >= 0)
        if sizing.kv_share is not None:
            within_share = kv <= sizing.kv_share * (left - self.table.longest_ring_bytes(rank))
        activations = sizing.activations
        host = np.asarray(float(budget.host_bytes - landing_bytes - activations.host_bytes))
        for count, size in (
            (sizing.num_host_blocks, stored_bytes),
            (sizing.num_rotating_host_blocks, stored_bytes),
            (sizing.num_tail_blocks, block_bytes),
        ):
            if count:
                host = host - _pages(count * size)
        rotating = sizing.num_rotating_nvme_blocks * sizing.stored.nvme_piece_bytes
        return Room(
            device=np.asarray(left - kv),
            host=np.asarray(host),
            nvme=np.asarray(
                budget.nvme_bytes - activations.nvme_bytes - rotating * load.num_layers
            ),
            may_stream=within_share,
        )

    def _lower_bounds(self, held: StageDevices) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """By stage group: no stage time is below these (units are taken as divisible and the ring
        as nothing), and whether it is exactly this."""
        slowest = np.zeros_like(self.table.group_loads[0].num_layers)
        exact = np.ones(slowest.shape, dtype=np.bool_)
        counted: set[tuple[int, int]] = set()
        for rank, device in enumerate(held.devices):
            alike = id(self.table.group_loads[rank]), id(device)
            if alike in counted:
                continue
            counted.add(alike)
            key = (*alike, held.group_link, held.next_link)
            if key not in self._ranks:
                self._ranks[key] = self._lower_bound(rank, held)
            seconds, is_exact = self._ranks[key]
            slowest = np.maximum(slowest, seconds)
            exact &= is_exact
        return slowest, exact | np.isinf(slowest)

    def _lower_bound(
        self, rank: int, held: StageDevices
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The same for one rank; inf: it does not fit."""
        load, device = self.table.group_loads[rank], held.devices[rank]
        room = self._room(rank, load, device)
        resident = load.stream_bytes <= room.device
        streamed = np.where(resident, 0.0, load.stream_bytes - room.device)
        on_disk = np.maximum(0.0, streamed - room.host)
        # the terms' own least: experts stream before all else, or lie on disk after all else
        dense = load.stream_bytes - load.routed_bytes
        busy = self.costs.terms(
            load,
            self.decode,
            device.bandwidths,
            streamed,
            on_disk,
            np.maximum(0.0, streamed - dense),
            np.maximum(0.0, on_disk - dense),
            group_link=held.group_link,
            next_link=held.next_link,
        )
        _, link_s, disk_s = self.costs.transfers(
            load,
            self.decode,
            device.bandwidths,
            streamed,
            on_disk,
            np.minimum(load.routed_bytes, streamed),
            np.minimum(load.routed_bytes, on_disk),
        )
        seconds = np.maximum(np.maximum(link_s, disk_s), compute_time(busy))
        fits = (room.device >= 0) & (room.host >= 0) & (room.nvme >= 0)
        fits &= load.stream_bytes + load.embedding_bytes <= room.device + room.host + room.nvme
        fits &= resident | room.may_stream
        left = np.maximum(room.device - load.stream_bytes, np.maximum(room.host, room.nvme))
        exact = resident & (load.embedding_bytes <= left)
        return np.where(fits, seconds, np.inf), exact


def _pages(num_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.ceil(num_bytes / PAGE_BYTES) * PAGE_BYTES)


def _runs_of(layer_split: tuple[int, ...]) -> NDArray[np.float64]:
    """[first, end]: 0 for the runs of a split, inf for all others."""
    cuts = [0, *accumulate(layer_split)]
    allowed = np.full((cuts[-1] + 1,) * 2, np.inf)
    allowed[cuts[:-1], cuts[1:]] = 0.0
    return allowed
