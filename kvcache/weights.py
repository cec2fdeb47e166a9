"""The weights of one shard on three tiers, brought to the device ahead of the computation.

A pass uses its units in a fixed cyclic order, so the ones that are not resident are fetched in that
order into a ring on the device, always as far ahead as the ring has room: past the end of a pass
into the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from kvcache.allocations import Allocations
from kvcache.arena import ALIGNMENT, Arena
from kvcache.errors import StoreError, TierFullError
from kvcache.expert_reader import expert_extents, read_experts
from kvcache.flight import Flight, FlightState
from kvcache.resident_units import Arrived, Fill, ResidentUnits
from kvcache.ring import Ring
from kvcache.row_reader import RowReader
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier
from kvcache.trace import Trace
from kvcache.transfer_stats import Link, TransferStats
from kvcache.unit_layout import TensorSlot, UnitLayout

__all__ = ["Fill", "TensorSlot", "UnitLayout", "WeightManager"]

_ATTEMPTS = 2
_FROM_HOST = Link("weights", Tier.HOST, Tier.DEVICE)


class WeightManager:
    """Owns every weight of a shard, the ring, and the store; takes their memory from the two
    arenas.

    `acquire` and `release` are called by the thread that computes. On a CUDA device the units are
    ready for the current stream when `acquire` returns, and `release` waits for what that stream
    was given so far.
    """

    def __init__(
        self,
        *,
        units: Sequence[UnitLayout],
        placements: Mapping[str, Tier],
        device: torch.device,
        device_arena: Arena,
        host_arena: Arena,
        ring_bytes: int,
        store: ShardStore | None = None,
        rows_only: Collection[str] = (),
        trace: Trace | None = None,
    ) -> None:
        """``units`` stand in the order of a pass. Those in ``rows_only`` are read by `gather_rows`
        alone.

        Raises ValueError for a placement that cannot work. Nothing is allocated before `load`.
        """
        self._units = {unit.name: unit for unit in units}
        self._tiers = {name: placements[name] for name in self._units}
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._memory = Allocations(device_arena, host_arena)
        self._resident = ResidentUnits(units, self._tiers, self._memory, self._on_cuda)
        self._store = store
        self._order = [
            unit.name
            for unit in units
            if self._tiers[unit.name] is not Tier.DEVICE and unit.name not in rows_only
        ]
        self._index = {name: position for position, name in enumerate(self._order)}
        self._ring = Ring(ring_bytes // ALIGNMENT * ALIGNMENT if self._order else 0)
        self._staging = Ring(self._staging_bytes() if self._on_cuda else 0)
        self._check_placements()
        self.transfers = TransferStats(trace)
        self._ring_bytes = torch.empty(0, dtype=torch.uint8)
        self._staging_memory = torch.empty(0, dtype=torch.uint8)
        self._rows: RowReader | None = None
        self._changed = threading.Condition()
        self._flights: dict[str, Flight] = {}
        self._cursor = 0
        self._num_loading = 0
        self._closed = False
        self.whole_experts = False
        """Whether units come with all their experts: where a pass routes to nearly all of them,
        reading them ahead beats leaving some out."""
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="weight-copy")
        self._copy_stream: torch.cuda.Stream | None = None
        if self._on_cuda:
            self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last_release: torch.cuda.Event | None = None

    def load(
        self,
        fill: Fill,
        progress: Callable[[int], None] = lambda num_bytes: None,
        *,
        first: Collection[str] = (),
        arrived: Arrived = lambda unit, tensors: None,
    ) -> None:
        """Start to bring every unit to its tier, and to prefetch; `wait_until_loaded` waits for it.

        NVMe units are written to the store before this returns, unless it holds them already. The
        others are filled in a thread, those in ``first`` before this returns; whoever needs one
        waits. ``progress`` gets each unit's bytes, ``arrived`` each unit that stays on the device,
        before anyone acquires it. Closes itself and raises what failed: TierFullError, StoreError,
        or ``fill``'s own error.
        """
        try:
            self._load_nvme(fill, progress)
            if self._order:
                self._ring_bytes = self._memory.on_device(self._ring.capacity)
            self._resident.load(
                fill,
                first=first,
                arrived=arrived,
                progress=progress,
                changed=self._go_on,
                then=self._allocate_staging,
            )
        except BaseException:
            self.close()
            raise
        with self._changed:
            self._advance()

    def wait_until_loaded(self) -> None:
        """Until every unit is on its tier; raises what the load failed with, StoreError once
        closed."""
        self._resident.wait()

    @property
    def is_loaded(self) -> bool:
        """Whether every unit is on its tier."""
        return self._resident.is_complete

    @property
    def nvme_bytes(self) -> int:
        """What the weights take of the disk."""
        return 0 if self._store is None else self._store.num_bytes

    def acquire(self, unit: str) -> dict[str, torch.Tensor]:
        """The unit's tensors on the device, by name; blocks until they are there.

        Valid until the matching `release`; do not write to them. In the order of the pass this
        waits only for I/O that is slower than the computation; in any other order it starts the
        prefetch afresh from there. Raises StorageError or CorruptUnitError if the unit cannot be
        read, TierFullError if units that are held leave it no room in the ring.
        """
        if self._tiers.get(unit) is Tier.DEVICE:
            return self._acquire_resident(unit)
        if unit not in self._index:
            raise ValueError(f"unit {unit} is not one that a pass acquires")
        with self._changed:
            flight = self._locate(unit)
            while flight is None or flight.state is FlightState.LOADING:
                started = time.perf_counter()
                self._changed.wait()
                self.transfers.add_stall(started, unit)
                if flight is None or self._closed:
                    flight = self._locate(unit)
            if flight.error is not None:
                self._drop(flight)
                raise flight.error
            flight.holders += 1
            return flight.views

    def acquire_experts(self, unit: str, experts: Sequence[int]) -> None:
        """Bring these rising experts of a unit that is acquired to its tensors; the others' places
        hold nothing of use.

        Returns when they are there. Raises as `acquire`.
        """
        flight = self._flights.get(unit)
        if flight is None or not flight.missing:
            return
        wanted = [expert for expert in experts if expert in flight.missing]
        if not wanted:
            return
        started = time.perf_counter()
        source = self._resident.on_host(unit) if self._tiers[unit] is Tier.HOST else None
        link = self._read_link(flight) if source is None else _FROM_HOST
        num_bytes = 0
        self.transfers.begin(link)
        try:
            if source is None:
                assert self._store is not None
                num_bytes = read_experts(self._store, flight.layout, wanted, flight.buffer)
            else:
                for low, high, _ in expert_extents(flight.layout, wanted):
                    flight.buffer[low:high].copy_(source[low:high], non_blocking=True)
                    num_bytes += high - low
        finally:
            self.transfers.end(link, num_bytes, started, f"{len(wanted)} experts of {unit}")
        self.transfers.add_stall(started, unit)
        flight.missing.difference_update(wanted)

    def release(self, unit: str) -> None:
        """The computation no longer needs the unit; its room may be reused. ValueError if not
        acquired."""
        if self._tiers.get(unit) is Tier.DEVICE:
            return
        with self._changed:
            flight = self._flights.get(unit)
            if flight is None or flight.holders == 0:
                raise ValueError(f"unit {unit} is released but not acquired")
            flight.holders -= 1
            if flight.holders == 0:
                if self._on_cuda:
                    self._last_release = torch.cuda.current_stream(self._device).record_event()
                self._drop(flight)
                self._advance()

    def gather_rows(self, unit: str, tensor: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows ``ids`` (int64 [n]) of a tensor, as [n, ...] on the device, from whatever tier.

        From NVMe only the pages of those rows are read. Raises IndexError for a row that does not
        exist.
        """
        slot = self._units[unit].slot(tensor)
        if self._tiers[unit] is Tier.DEVICE:
            tensors = self._acquire_resident(unit)
            return tensors[tensor].index_select(0, ids.to(self._device))
        if self._tiers[unit] is Tier.HOST:
            matrix = slot.view(self._resident.on_host(unit))
            link = Link("rows", Tier.HOST, Tier.DEVICE)
            begun_s = self.transfers.begin(link)
            rows = matrix.index_select(0, ids.cpu()).to(self._device)
            self.transfers.end(link, rows.nbytes, begun_s, unit)
            return rows
        assert self._rows is not None, "the weights are not loaded"
        link = Link("rows", Tier.NVME, Tier.DEVICE)
        num_bytes = 0
        begun_s = self.transfers.begin(link)
        try:
            rows, num_bytes = self._rows.read(unit, slot, ids)
        finally:
            self.transfers.end(link, num_bytes, begun_s, unit)
        return rows.to(self._device)

    def stats(self) -> dict[str, Any]:
        """Plain data: seconds stalled in `acquire`; transfers, bytes and busy time of each link."""
        return {
            "stall_s": self.transfers.stall_s,
            "transfers": {
                f"{link.kind}_{link.source.value}_to_{link.target.value}": asdict(totals)
                for link, totals in self.transfers.snapshot().items()
            },
        }

    def close(self) -> None:
        """Wait for transfers under way, end the threads, close the store, free the memory.
        Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._resident.close()
        with self._changed:
            self._changed.wait_for(lambda: self._num_loading == 0)
        self._copies.shutdown(wait=True)
        if self._rows is not None:
            self._rows.close()
        if self._store is not None:
            self._store.close()
        self._flights.clear()
        self._memory.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless ring, flights and arenas agree."""
        with self._changed:
            self._ring.check_integrity()
            self._staging.check_integrity()
            loading = [f for f in self._flights.values() if f.state is FlightState.LOADING]
            assert len(loading) <= self._num_loading
            assert self._ring.num_held >= len(self._flights)
            assert self._ring.num_held <= len(self._flights) + self._num_loading
            for name, flight in self._flights.items():
                assert flight.layout.name == name and not flight.dropped
                assert flight.holders == 0 or flight.state is FlightState.READY
        self._memory.check_integrity()

    def _check_placements(self) -> None:
        if Tier.NVME in self._tiers.values() and self._store is None:
            raise ValueError("units are placed on NVMe, but there is no store for them")
        largest = max((self._units[name].num_bytes for name in self._order), default=0)
        if largest > self._ring.capacity:
            raise ValueError(
                f"the ring of {self._ring.capacity} bytes cannot hold the largest unit that passes "
                f"through it; make it {largest} bytes or more, twice that to overlap"
            )

    def _staging_bytes(self) -> int:
        sizes = [self._units[n].num_bytes for n in self._order if self._tiers[n] is Tier.NVME]
        return 2 * max(sizes, default=0)

    def _load_nvme(self, fill: Fill, progress: Callable[[int], None]) -> None:
        units = [self._units[n] for n, tier in self._tiers.items() if tier is Tier.NVME]
        if self._store is None or not units:
            return
        scratch: list[torch.Tensor] = []

        def staging(num_bytes: int) -> torch.Tensor:
            scratch.append(self._memory.scratch(num_bytes))
            return scratch[0]

        self._store.open_units(units, fill, staging, progress)
        for buffer in scratch:
            self._memory.free(buffer)
        slots = [slot for unit in units for slot in unit.tensors if slot.shape]
        row_bytes = max((slot.num_bytes // slot.shape[0] for slot in slots), default=0)
        self._rows = RowReader(self._store, row_bytes)
        for unit in units:
            if unit.name not in self._index:
                self._rows.verify_first_read(unit.name)

    def _allocate_staging(self) -> None:
        """The host has room for it once the load needs none."""
        if self._staging.capacity:
            self._staging_memory = self._memory.on_host(self._staging.capacity)

    def _go_on(self) -> None:
        """What the load has brought may be waited for."""
        with self._changed:
            self._advance()
            self._changed.notify_all()

    def _acquire_resident(self, unit: str) -> dict[str, torch.Tensor]:
        if self._resident.has(unit):
            return self._resident.on_device(unit)
        started = time.perf_counter()
        tensors = self._resident.on_device(unit)
        self.transfers.add_stall(started, unit)
        return tensors

    def _locate(self, unit: str) -> Flight | None:
        """The unit's flight, older ones that nobody holds dropped. Turns the prefetch to it if it
        has none; None while dropped transfers still occupy the room it needs."""
        if self._closed:
            raise StoreError("the weights are closed")
        if unit not in self._flights:
            for flight in list(self._flights.values()):
                self._drop_unheld(flight)
            self._cursor = self._index[unit]
            self._advance()
            if self._awaits_load(unit):
                self._resident.check()
            elif unit not in self._flights and self._num_loading == 0:
                held = sum(flight.layout.num_bytes for flight in self._flights.values())
                size, capacity = self._units[unit].num_bytes, self._ring.capacity
                raise TierFullError(Tier.DEVICE, size, capacity - held, capacity)
            return self._flights.get(unit)
        for name, flight in list(self._flights.items()):
            if name == unit:
                break
            self._drop_unheld(flight)
        return self._flights[unit]

    def _drop_unheld(self, flight: Flight) -> None:
        if flight.holders == 0:
            self._drop(flight)

    def _drop(self, flight: Flight) -> None:
        """Forget a flight. Its room is free at once, or when its transfer is over."""
        del self._flights[flight.layout.name]
        flight.dropped = True
        if flight.state is not FlightState.LOADING:
            self._ring.free(flight.start)

    def _advance(self) -> None:
        """Start fetching the next units of the cycle while there is room for them. Lock held."""
        while self._order and not self._closed:
            name = self._order[self._cursor]
            if name in self._flights or not self._launch(self._units[name]):
                return
            self._cursor = (self._cursor + 1) % len(self._order)

    def _awaits_load(self, unit: str) -> bool:
        """Whether the load must get on before the unit can be fetched."""
        if self._tiers[unit] is Tier.HOST:
            return not self._resident.has(unit)
        return self._staging_memory.nbytes < self._staging.capacity

    def _launch(self, unit: UnitLayout) -> bool:
        if self._awaits_load(unit.name):
            return False
        staging, staging_start = None, 0
        if self._on_cuda and self._tiers[unit.name] is Tier.NVME:
            place = self._staging.allocate(unit.num_bytes)
            if place is None:
                return False
            staging_start = place
            staging = self._staging_memory[place : place + unit.num_bytes]
        start = self._ring.allocate(unit.num_bytes)
        if start is None:
            if staging is not None:
                self._staging.free(staging_start)
            return False
        buffer = self._ring_bytes[start : start + unit.num_bytes]
        flight = Flight(unit, start, buffer, unit.views(buffer), staging, staging_start)
        if not self.whole_experts and staging is None:
            flight.missing.update(range(unit.num_experts))
        self._flights[unit.name] = flight
        self._num_loading += 1
        self._start(flight)
        return True

    def _start(self, flight: Flight) -> None:
        flight.attempts += 1
        name = flight.layout.name
        if self._tiers[name] is Tier.HOST:
            if self._on_cuda:
                self._copies.submit(self._copy, flight, self._resident.on_host(name))
            else:
                self._copy(flight, self._resident.on_host(name))
            return
        assert self._store is not None
        target = (flight.buffer if flight.staging is None else flight.staging)[: flight.num_bytes]
        link = self._read_link(flight)
        flight.begun_s = self.transfers.begin(link)
        future = self._store.submit_part(name, 0, target)
        future.add_done_callback(lambda done: self._read_done(flight, target, done))

    def _read_link(self, flight: Flight) -> Link:
        return Link("weights", Tier.NVME, Tier.DEVICE if flight.staging is None else Tier.HOST)

    def _read_done(self, flight: Flight, target: torch.Tensor, done: Future[None]) -> None:
        assert self._store is not None
        error = done.exception()
        num_bytes = 0 if error else flight.num_bytes
        self.transfers.end(self._read_link(flight), num_bytes, flight.begun_s, flight.layout.name)
        if error is None:
            try:
                if flight.missing:
                    self._store.check_section(flight.layout.name, 0, target)
                else:
                    self._store.check_first_read(flight.layout.name, target)
            except Exception as failure:  # surfaces in acquire
                error = failure
        if error is None and flight.staging is not None:
            self._copies.submit(self._copy, flight, flight.staging)
        else:
            self._settle(flight, error)

    def _copy(self, flight: Flight, source: torch.Tensor) -> None:
        """Copy a unit from host memory into the ring. For a CUDA device it runs in the copy thread;
        a CPU copies with the cores that compute, which a thread beside them would only delay."""
        error: BaseException | None = None
        part = slice(0, flight.num_bytes)
        begun_s = self.transfers.begin(_FROM_HOST)
        try:
            if self._copy_stream is None:
                flight.buffer[part].copy_(source[part])
            else:
                with torch.cuda.stream(self._copy_stream):
                    if self._last_release is not None:
                        self._copy_stream.wait_event(self._last_release)
                    flight.buffer[part].copy_(source[part], non_blocking=True)
                self._copy_stream.synchronize()
        except Exception as failure:  # surfaces in acquire
            error = failure
        num_bytes = 0 if error else flight.num_bytes
        self.transfers.end(_FROM_HOST, num_bytes, begun_s, flight.layout.name)
        self._settle(flight, error)

    def _settle(self, flight: Flight, error: BaseException | None) -> None:
        """A transfer is over: try once more if it failed, else make its outcome known."""
        with self._changed:
            abandoned = flight.dropped or self._closed
            if error is not None and not abandoned and flight.attempts < _ATTEMPTS:
                self._start(flight)
                return
            self._num_loading -= 1
            flight.error = error
            flight.state = FlightState.READY if error is None else FlightState.FAILED
            if flight.staging is not None:
                self._staging.free(flight.staging_start)
                flight.staging = None
            if flight.dropped:
                self._ring.free(flight.start)
            self._advance()
            self._changed.notify_all()
