"""What a device, its links and its collectives reach: the constants of the cost model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from partition.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRate:
    """FLOP/s of a matrix product with a ``rows``-row activation."""

    rows: int
    flops_per_s: float

    def __post_init__(self) -> None:
        if self.rows < 1 or not 0 < self.flops_per_s < math.inf:
            raise PlanError(
                f"a GEMM rate of {self.flops_per_s} FLOP/s at {self.rows} rows cannot be"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Rates of one device in bytes/s and latencies in seconds.

    ``gemm`` is sorted by rows and interpolated between them. ``unit_latency_s`` is lost once per
    unit per pass.
    """

    device_memory: float
    host_to_device: float
    disk_read: float
    disk_write: float
    gemm: tuple[GemmRate, ...]
    unit_latency_s: float = 5e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "gemm":
                continue
            value = getattr(self, field.name)
            is_latency = field.name.endswith("_s")
            if not (value >= 0 if is_latency else value > 0) or not math.isfinite(value):
                raise PlanError(f"{field.name} is {value}; it must be a positive, finite number")
        rows = [rate.rows for rate in self.gemm]
        if not rows or rows != sorted(set(rows)):
            raise PlanError(f"gemm rows are {rows}; give at least one, rising")

    def flops_per_s(self, rows: float) -> float:
        """FLOP/s at ``rows`` rows: linear in log(rows) between measured points, constant
        outside."""
        points = self.gemm
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
        changes: dict[str, float] = {
            name: getattr(self, name) / num_devices
            for resource in resources
            for name in RESOURCES[resource]
        }
        gemm = self.gemm
        if "compute" in resources:
            gemm = tuple(replace(g, flops_per_s=g.flops_per_s / num_devices) for g in gemm)
        return replace(self, gemm=gemm, **changes)


RESOURCES: dict[str, tuple[str, ...]] = {
    "memory": ("device_memory", "host_to_device"),
    "disk": ("disk_read", "disk_write"),
    "compute": (),
}
"""What the devices of a node may share, and the rates that this divides."""
