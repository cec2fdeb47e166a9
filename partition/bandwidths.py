"""What a device, its tiers and its runtime reach: the constants of the cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from kvcache.layout import STORAGE_DTYPES
from partition.errors import FieldError


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRate:
    """FLOP/s of a matrix product with a ``rows``-row activation."""

    rows: int
    flops_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """Bytes/s of requests of ``block_bytes``, a few at a time."""

    block_bytes: int
    read: float
    write: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRate:
    """Bytes/s of KV, counted as it is on the device, that go into a storage dtype and come out of
    it."""

    storage_dtype: str
    encode: float
    decode: float

    def __post_init__(self) -> None:
        if self.storage_dtype not in STORAGE_DTYPES[1:]:
            known = ", ".join(STORAGE_DTYPES[1:])
            raise FieldError("storage_dtype", f"{self.storage_dtype!r} is none of {known}")
        check_rates(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeRates:
    """What a pass costs beside its matrix products; None: at the rate of the device's memory.

    ``layer_latency_s`` and ``pass_latency_s`` are lost at any size (launches, scheduling), and
    ``expert_latency_s`` with every expert that a layer computes.
    ``attention`` is the rate at which decode attention reads KV and ``elementwise`` that of norms,
    activations and residuals, in bytes/s; ``sampling`` are logits/s.
    """

    layer_latency_s: float = 3e-4
    pass_latency_s: float = 1e-3
    expert_latency_s: float = 0.0
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
    cores. ``disk_read`` and ``disk_write`` are those of requests of some MiB, ``disk_blocks`` of
    smaller ones, rising (empty: as fast); ``kv_codecs`` of the storage dtypes of KV (a missing one
    works at the rate of the device's memory). ``host_attention`` is what the host's cores reach
    where attention reads KV in host memory, with all of them at work for this device (None: they
    are the device, or are not known).
    """

    device_memory: float
    host_to_device: float
    device_to_host: float
    disk_read: float
    disk_write: float
    gemm: tuple[GemmRate, ...]
    streamed_gemm: tuple[GemmRate, ...] = ()
    disk_blocks: tuple[DiskRate, ...] = ()
    kv_codecs: tuple[CodecRate, ...] = ()
    host_attention: float | None = None
    row_tile: int = 1
    copies_overlap: bool = True
    runtime: RuntimeRates = field(default_factory=RuntimeRates)

    def __post_init__(self) -> None:
        check_rates(self)
        for name in ("gemm", "streamed_gemm"):
            rows = [rate.rows for rate in getattr(self, name)]
            if (name == "gemm" and not rows) or rows != sorted(set(rows)):
                raise FieldError(name, f"rows are {rows}; give at least one, rising")
        sizes = [rate.block_bytes for rate in self.disk_blocks]
        if sizes != sorted(set(sizes)):
            raise FieldError("disk_blocks", f"block_bytes are {sizes}; let them rise")

    def flops_per_s(self, rows: float, *, streamed: bool = False) -> float:
        """FLOP/s at ``rows`` rows: linear in log(rows) between measured points, constant outside,
        less what the last tile leaves unused."""
        points = (self.streamed_gemm if streamed else ()) or self.gemm
        tiles = math.ceil(rows / self.row_tile) * self.row_tile
        return rows / tiles * _between([(rate.rows, rate.flops_per_s) for rate in points], rows)

    def disk_read_of(self, block_bytes: float) -> float:
        """Bytes/s of reads of ``block_bytes``: linear in their logarithm between measured points,
        constant outside."""
        if not self.disk_blocks:
            return self.disk_read
        points = [(rate.block_bytes, rate.read) for rate in self.disk_blocks]
        return min(self.disk_read, _between(points, block_bytes))

    def disk_write_of(self, block_bytes: float) -> float:
        """The same of writes."""
        if not self.disk_blocks:
            return self.disk_write
        points = [(rate.block_bytes, rate.write) for rate in self.disk_blocks]
        return min(self.disk_write, _between(points, block_bytes))

    @property
    def attention(self) -> float:
        """Bytes/s at which decode attention reads KV on the device."""
        return self.runtime.attention or self.device_memory

    @property
    def attention_on_host(self) -> float | None:
        """The same of KV on the host, by the host's cores; None: not known."""
        return self.host_attention if self.copies_overlap else self.attention

    def kv_codec(self, storage_dtype: str) -> CodecRate:
        """The rates of a storage dtype that is not "auto"."""
        for rate in self.kv_codecs:
            if rate.storage_dtype == storage_dtype:
                return rate
        memory = self.device_memory
        return CodecRate(storage_dtype=storage_dtype, encode=memory, decode=memory)

    def shared_by(self, num_devices: float, resources: tuple[str, ...]) -> Bandwidths:
        """The part of one of ``num_devices`` that use the named `RESOURCES` at the same time."""
        if num_devices == 1:
            return self
        changes: dict[str, Any] = {
            name: getattr(self, name) / num_devices
            for resource in resources
            for name in RESOURCES[resource]
        }
        if "disk" in resources:
            changes["disk_blocks"] = _divided(self.disk_blocks, ("read", "write"), num_devices)
        if "compute" in resources:
            changes["kv_codecs"] = _divided(self.kv_codecs, ("encode", "decode"), num_devices)
            for name in ("gemm", "streamed_gemm"):
                changes[name] = _divided(getattr(self, name), ("flops_per_s",), num_devices)
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


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at ``at`` of (place, value) points: linear in log(place), constant outside."""
    if at <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in pairwise(points):
        if at <= high:
            return below + math.log(at / low) / math.log(high / low) * (above - below)
    return points[-1][1]


def _divided(points: tuple[Any, ...], names: tuple[str, ...], by: float) -> tuple[Any, ...]:
    """The points with the rates of these names divided."""
    return tuple(replace(p, **{name: getattr(p, name) / by for name in names}) for p in points)


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
