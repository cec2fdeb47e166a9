"""Short measurements of this machine, cached with their date."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partition.bandwidths import Bandwidths, GemmRate
from partition.codec import decode, encode
from partition.disk_probe import probe_disk
from partition.errors import PlanError
from partition.links import Link

CALIBRATION_VERSION = 2
GEMM_ROWS = (1, 8, 64, 256)
GEMM_SIDE = 2048
BUFFER_BYTES = 128 << 20
TIME_LIMIT_S = 0.15
LOOPBACK = Link(bandwidth=1e9, latency_s=2e-4, all_reduce_bandwidth=1e9, all_reduce_latency_s=4e-4)
"""gloo over loopback on an ordinary machine; collectives need a second process to be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured: where, when (ISO 8601), and the rates. ``direct_io``: the disk was read
    past the page cache."""

    machine: str
    folder: str
    device: str
    dtype: str
    measured_at: str
    direct_io: bool
    bandwidths: Bandwidths
    link: Link
    version: int = CALIBRATION_VERSION


def calibrate(
    folder: Path,
    device: str = "cpu",
    dtype: str = "bfloat16",
    *,
    refresh: bool = False,
    cache_folder: Path | None = None,
) -> Calibration:
    """Bandwidths of this machine, from the cache unless ``refresh``; else measured in about 3 s.

    ``folder`` is where weights would lie on NVMe; it must exist and be writable (PlanError if not).
    The cache is ``cache_folder`` or ``$XDG_CACHE_HOME/giantserve`` or ``~/.cache/giantserve``.
    """
    path = _cache_path(cache_folder or default_cache_folder(), folder, device, dtype)
    if not refresh:
        cached = _load(path)
        if cached is not None:
            return cached
    measured = _measure(folder, device, dtype)
    _store(path, measured)
    return measured


def default_cache_folder() -> Path:
    """Where calibrations are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "giantserve"


def _machine() -> str:
    return f"{platform.node()} {platform.machine()} {len(os.sched_getaffinity(0))} cpus"


def _cache_path(cache: Path, folder: Path, device: str, dtype: str) -> Path:
    key = "\0".join((_machine(), str(folder.resolve()), device, dtype))
    return cache / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _load(path: Path) -> Calibration | None:
    """The cached calibration; None where there is none, or one that this version cannot read."""
    try:
        found = decode(Calibration, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    return found if found.version == CALIBRATION_VERSION else None


def _store(path: Path, calibration: Calibration) -> None:
    """Write the cache atomically; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(encode(calibration), file, indent=2)
    os.replace(name, path)


def _measure(folder: Path, device: str, dtype: str) -> Calibration:
    try:
        disk = probe_disk(folder)
    except OSError as error:
        raise PlanError(
            f"cannot measure the disk of {folder}: {error}; name a folder that can be written"
        ) from None
    memory, host_to_device = _memory_rates(device)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Calibration(
        machine=_machine(),
        folder=str(folder.resolve()),
        device=device,
        dtype=dtype,
        measured_at=now,
        direct_io=disk.direct,
        bandwidths=Bandwidths(
            device_memory=memory,
            host_to_device=host_to_device,
            disk_read=disk.read,
            disk_write=disk.write,
            gemm=_gemm_rates(device, dtype),
        ),
        link=LOOPBACK,
    )


def _memory_rates(device: str) -> tuple[float, float]:
    """(device memory read, host to device) in bytes/s. Without a GPU the link is a copy in
    memory."""
    import torch

    on_cuda = device.startswith("cuda")
    host = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, pin_memory=on_cuda)
    held = host.to(device, copy=True)
    read_s = _time(lambda: held.sum(), device)
    copy_s = _time(lambda: held.copy_(host, non_blocking=True), device)
    return BUFFER_BYTES / read_s, BUFFER_BYTES / copy_s


def _gemm_rates(device: str, dtype: str) -> tuple[GemmRate, ...]:
    """FLOP/s of [rows, side] x [side, 4 side], through weights that do not stay in the caches."""
    import torch

    weights = [
        torch.full((4 * GEMM_SIDE, GEMM_SIDE), 0.01, dtype=getattr(torch, dtype), device=device)
        for _ in range(4)
    ]
    rates = []
    for rows in GEMM_ROWS:
        hidden = torch.full((rows, GEMM_SIDE), 0.01, dtype=weights[0].dtype, device=device)
        turn = iter(range(1 << 30))
        seconds = _time(
            lambda hidden=hidden, turn=turn: torch.nn.functional.linear(  # type: ignore[misc]
                hidden, weights[next(turn) % len(weights)]
            ),
            device,
        )
        rates.append(GemmRate(rows=rows, flops_per_s=8 * rows * GEMM_SIDE**2 / seconds))
    return tuple(rates)


def _time(action: Callable[[], Any], device: str) -> float:
    """Seconds of one ``action``: the median of repeats within the time limit, after one to warm
    up."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    samples: list[float] = []
    deadline = time.perf_counter() + TIME_LIMIT_S
    while len(samples) < 3 or time.perf_counter() < deadline:
        samples.append(once())
    return sorted(samples)[len(samples) // 2]
