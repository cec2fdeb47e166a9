"""The units of weights that stay in memory, filled one after the other while others compute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from kvcache.allocations import Allocations
from kvcache.errors import StoreError
from kvcache.tier import Tier
from kvcache.unit_layout import UnitLayout

Fill = Callable[[UnitLayout, torch.Tensor], None]
"""Writes a unit's tensors into its zeroed bytes (uint8, CPU)."""

Arrived = Callable[[str, dict[str, torch.Tensor]], None]
"""Takes the name and the tensors of a unit that lies on the device now."""


class ResidentUnits:
    """Loads the units of the DEVICE and HOST tiers in a thread of its own; whoever needs one waits
    for it alone.

    For a CUDA device a unit goes through a buffer on the host, which has room there before the
    units of the HOST tier come: those of the device are loaded first.
    """

    def __init__(
        self,
        units: Sequence[UnitLayout],
        tiers: Mapping[str, Tier],
        memory: Allocations,
        on_cuda: bool,
    ) -> None:
        """``units`` stand in the order of a pass; those on NVMe are left alone."""
        self._memory = memory
        self._on_cuda = on_cuda
        self._tiers = tiers
        self._units = [unit for unit in units if tiers[unit.name] is not Tier.NVME]
        if on_cuda:
            self._units.sort(key=lambda unit: tiers[unit.name] is Tier.HOST)
        self._missing = {unit.name for unit in self._units}
        self._device: dict[str, dict[str, torch.Tensor]] = {}
        self._host: dict[str, torch.Tensor] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def load(
        self,
        fill: Fill,
        *,
        first: Collection[str] = (),
        arrived: Arrived = lambda unit, tensors: None,
        progress: Callable[[int], None] = lambda num_bytes: None,
        changed: Callable[[], None] = lambda: None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Fill the units ``first`` here, the others in the thread, in their order.

        ``arrived`` gets each unit of the device before anyone else does, ``progress`` the bytes of
        each unit. ``changed`` is called when a unit is there, and when nothing more comes,
        ``then`` in between: where that fails, so has the load. Raises what the first ones fail
        with: TierFullError, or ``fill``'s own error.
        """

        def load(units: Sequence[UnitLayout]) -> None:
            scratch = self._scratch(units)
            for unit in units:
                self._check_open()
                if self._tiers[unit.name] is Tier.HOST:
                    if scratch is not None:
                        self._memory.free(scratch)
                        scratch = None
                    self._load_host(unit, fill)
                else:
                    arrived(unit.name, self._load_device(unit, fill, scratch))
                with self._changed:
                    self._missing.discard(unit.name)
                    self._changed.notify_all()
                progress(unit.num_bytes)
                changed()
            if scratch is not None:
                self._memory.free(scratch)

        def load_rest() -> None:
            error: BaseException | None = None
            try:
                load([unit for unit in self._units if unit.name not in first])
                then()
            except BaseException as failure:  # surfaces where a unit is waited for
                error = failure
            with self._changed:
                self._error, self._ended = error, True
                self._changed.notify_all()
            changed()

        load([unit for unit in self._units if unit.name in first])
        self._thread = threading.Thread(target=load_rest, name="load-weights", daemon=True)
        self._thread.start()

    def has(self, unit: str) -> bool:
        """Whether the unit is there."""
        return unit not in self._missing and (unit in self._device or unit in self._host)

    @property
    def is_complete(self) -> bool:
        """Whether all units are there."""
        return self._ended and self._error is None

    def check(self) -> None:
        """Raise what the load failed with, if it has."""
        if self._error is not None:
            raise self._error

    def on_device(self, unit: str) -> dict[str, torch.Tensor]:
        """The tensors of a unit of the device; waits for them.

        Raises what the load failed with, StoreError once closed.
        """
        self._wait(unit)
        return self._device[unit]

    def on_host(self, unit: str) -> torch.Tensor:
        """The bytes of a unit of the host; waits and raises as `on_device`."""
        self._wait(unit)
        return self._host[unit]

    def wait(self) -> None:
        """Until the load is complete; raises as `on_device`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ended)
        self.check()
        if not self._ended:
            self._check_open()

    def close(self) -> None:
        """End the load after the unit under way, and forget the units. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._device.clear()
        self._host.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the weights are closed")

    def _wait(self, unit: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ended or unit not in self._missing)
            self._check_open()
            if unit in self._missing:
                assert self._error is not None
                raise self._error

    def _scratch(self, units: Sequence[UnitLayout]) -> torch.Tensor | None:
        sizes = [unit.num_bytes for unit in units if self._tiers[unit.name] is Tier.DEVICE]
        return self._memory.scratch(max(sizes)) if self._on_cuda and sizes else None

    def _load_host(self, unit: UnitLayout, fill: Fill) -> None:
        buffer = self._memory.on_host(unit.num_bytes)
        fill(unit, buffer)
        self._host[unit.name] = buffer

    def _load_device(
        self, unit: UnitLayout, fill: Fill, scratch: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        buffer = self._memory.on_device(unit.num_bytes)
        if scratch is None:
            fill(unit, buffer)
        else:
            part = scratch[: unit.num_bytes].zero_()
            fill(unit, part)
            buffer.copy_(part)
        self._device[unit.name] = unit.views(buffer)
        return self._device[unit.name]
