"""How fast each storage backend reads a folder's disk, as a pass reads weights: whole units, a few
ahead."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from kvcache.arena import Arena
from kvcache.errors import BackendUnavailableError
from kvcache.storage import BACKENDS, StorageBackend, reserve
from kvcache.tier import Tier

UNIT_BYTES, NUM_UNITS, DEPTH, ROUNDS = 24 << 20, 12, 4, 3
ALIGNMENT = 4096


def probe_backends(folder: Path) -> dict[str, float]:
    """Bytes/s by backend, of those that this machine can run; in about 1 s, once each is loaded.

    Takes at most a quarter of what is free, with smaller units where that is little. Raises OSError
    or StorageError where ``folder`` cannot be written or is full.
    """
    backends: dict[str, StorageBackend] = {}
    for name, make in BACKENDS.items():
        try:
            backends[name] = make()
        except BackendUnavailableError:
            continue
    rates: dict[str, list[float]] = {name: [] for name in backends}
    room = shutil.disk_usage(folder).free // 4 // NUM_UNITS
    unit_bytes = max(ALIGNMENT, min(UNIT_BYTES, room) // ALIGNMENT * ALIGNMENT)
    arena = Arena(Tier.DEVICE, DEPTH * unit_bytes)
    buffer = arena.allocate(DEPTH * unit_bytes).fill_(1)
    try:
        with tempfile.TemporaryDirectory(prefix=".giantserve-probe-", dir=folder) as inside:
            path = Path(inside) / "units"
            _write(next(iter(backends.values())), path, buffer)
            for _ in range(ROUNDS):
                for name, backend in backends.items():
                    rates[name].append(_read(backend, path, buffer))
    finally:
        for backend in backends.values():
            backend.close()
        arena.close()
    return {name: statistics.median(found) for name, found in rates.items()}


def _write(backend: StorageBackend, path: Path, buffer: torch.Tensor) -> None:
    file = backend.open(path, writable=True)
    try:
        reserve(file, NUM_UNITS // DEPTH * buffer.nbytes)
        for index in range(NUM_UNITS // DEPTH):
            backend.write(file, index * buffer.nbytes, buffer)
    finally:
        file.close()


def _read(backend: StorageBackend, path: Path, buffer: torch.Tensor) -> float:
    unit_bytes = buffer.nbytes // DEPTH
    file = backend.open(path)
    flying: list[Future[None]] = []
    begin = time.perf_counter()
    try:
        for index in range(NUM_UNITS):
            if len(flying) == DEPTH:
                flying.pop(0).result()
            place = index % DEPTH * unit_bytes
            target = buffer[place : place + unit_bytes]
            flying.append(backend.submit(file, index * unit_bytes, target))
        for future in flying:
            future.result()
        return NUM_UNITS * unit_bytes / (time.perf_counter() - begin)
    finally:
        file.close()
