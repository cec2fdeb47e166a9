"""What a device, its tiers and its runtime reach: the constants of the cost model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from partition.errors import FieldError


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRate:
    """FLOP/s of a matrix product with a ``rows``-row activation."""

    rows: int
    flops_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeRates:
    """What a pass costs beside its matrix products; None: at the rate of the device's memory.

    ``layer_latency_s`` and ``pass_latency_s`` are lost at any size (launches, scheduling).
    ``attention`` is the rate at which decode attention reads KV and ``elementwise`` that of norms,
    activations and residuals, in bytes/s; ``sampling`` are logits/s.
    """

    layer_latency_s: float = 3e-4
    pass_latency_s: float = 1e-3
    attention: float | None = None
    elementwise: float | None = None
    sampling: float | None = None

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Rates of one device in bytes/s.

    ``gemm`` is sorted by rows and interpolated between them; ``streamed_gemm`` is the same for
    weights that only pass through the device, where these have no layout of their own (empty: as
    ``gemm``). ``row_tile``: products compute whole tiles of so many rows, however few are used
    (tile quantisation, NVIDIA's matrix multiplication guide). ``copies_overlap``: what comes from
    host memory is copied beside compute, as by a GPU's copy engines; a CPU copies with its own
    cores.
    """

    device_memory: float
    host_to_device: float
    device_to_host: float
    disk_read: float
    disk_write: float
    gemm: tuple[GemmRate, ...]
    streamed_gemm: tuple[GemmRate, ...] = ()
    row_tile: int = 1
    copies_overlap: bool = True
    runtime: RuntimeRates = field(default_factory=RuntimeRates)

    def __post_init__(self) -> None:
        check_rates(self)
        for name in ("gemm", "streamed_gemm"):
            rows = [rate.rows for rate in getattr(self, name)]
            if (name == "gemm" and not rows) or rows != sorted(set(rows)):
                raise FieldError(name, f"rows are {rows}; give at least one, rising")

    def flops_per_s(self, rows: float, *, streamed: bool = False) -> float:
        """FLOP/s at ``rows`` rows: linear in log(rows) between measured points, constant outside,
        less what the last tile leaves unused."""
        points = (self.streamed_gemm if streamed else ()) or self.gemm
        tiles = math.ceil(rows / self.row_tile) * self.row_tile
        return rows / tiles * self._rate_of(points, rows)

    @staticmethod
    def _rate_of(points: tuple[GemmRate, ...], rows: float) -> float:
        if rows <= points[0].rows:
            return points[0].flops_per_s
        for low, high in pairwise(points):
            if rows <= high.rows:
                share = math.log(rows / low.rows) / math.log(high.rows / low.rows)
                return low.flops_per_s + share * (high.flops_per_s - low.flops_per_s)
        return points[-1].flops_per_s

    def shared_by(self, num_devices: int, resources: tuple[str, ...]) -> Bandwidths:
        """The part of one of ``num_devices`` that use the named `RESOURCES` at the same time."""
        if num_devices == 1:
            return self
        changes: dict[str, Any] = {
            name: getattr(self, name) / num_devices
            for resource in resources
            for name in RESOURCES[resource]
        }
        if "compute" in resources:
            for name in ("gemm", "streamed_gemm"):
                changes[name] = tuple(
                    replace(rate, flops_per_s=rate.flops_per_s / num_devices)
                    for rate in getattr(self, name)
                )
            rates = {name: getattr(self.runtime, name) for name in COMPUTE_RATES}
            changes["runtime"] = replace(
                self.runtime,
                **{name: rate and rate / num_devices for name, rate in rates.items()},
            )
        return replace(self, **changes)


COMPUTE_RATES = ("attention", "elementwise", "sampling")
"""The `RuntimeRates` that the device's cores bound."""

RESOURCES: dict[str, tuple[str, ...]] = {
    "memory": ("device_memory", "host_to_device", "device_to_host"),
    "disk": ("disk_read", "disk_write"),
    "compute": (),
}
"""What the devices of a node may share, and the rates that this divides."""


def check_rates(rates: Any) -> None:
    """Raise FieldError where a number of this dataclass can be no rate or, named ``*_s``, no
    latency."""
    for each in fields(rates):
        value = getattr(rates, each.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        is_latency = each.name.endswith("_s")
        if not (value >= 0 if is_latency else value > 0) or not math.isfinite(value):
            raise FieldError(each.name, f"{value} cannot be; it must be a positive, finite number")
