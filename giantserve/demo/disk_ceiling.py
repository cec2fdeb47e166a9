"""How fast the disk gives the packed weights to readers that do nothing else."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kvcache.arena import Arena
from kvcache.storage import BACKENDS
from kvcache.tier import Tier

BUFFER_BYTES = 32 << 20
PROBE_S = 1.5


class DiskCeiling:
    """What the shards' own files give when all are read at once, as the shards do.

    A disk that others use is fast one second and slow the next, so it is asked several times:
    before, between and after what is measured.
    """

    def __init__(self, folder: Path, num_shards: int) -> None:
        """``folder`` holds the shards' files; as many as there are shards are read at a time."""
        files = sorted(folder.glob("*.weights"), key=lambda path: path.stat().st_size)
        self._files = files[-num_shards:]
        self._moved_bytes = 0
        self._seconds = 0.0

    @property
    def bytes_per_s(self) -> float:
        """The rate over all probes together."""
        return self._moved_bytes / self._seconds

    def probe(self) -> None:
        """Measure now, while the server is idle. Takes `PROBE_S`."""
        started_s = time.perf_counter()
        with ThreadPoolExecutor(len(self._files)) as readers:
            self._moved_bytes += sum(readers.map(_read, self._files))
        self._seconds += time.perf_counter() - started_s


def _read(path: Path) -> int:
    """Read a file from its start, again and again, always two buffers at once."""
    size = min(BUFFER_BYTES, path.stat().st_size)
    arena = Arena(Tier.HOST, 2 * size, torch.device("cpu"))
    buffers = [arena.allocate(size) for _ in range(2)]
    backend = BACKENDS["posix"]()
    file = backend.open(path)
    offsets = range(0, path.stat().st_size - size + 1, size)
    give_up_s = time.perf_counter() + PROBE_S
    moved = 0
    index = 0
    pending = [backend.submit(file, 0, buffer) for buffer in buffers]
    while time.perf_counter() < give_up_s:
        for slot, buffer in enumerate(buffers):
            pending[slot].result()
            moved += size
            pending[slot] = backend.submit(file, offsets[index % len(offsets)], buffer)
            index += 1
    for read in pending:
        read.result()
    backend.close()
    file.close()
    arena.close()
    return moved + size * len(pending)
