"""Reads single rows of a table on NVMe: what an embedding lookup needs of it, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from kvcache.arena import ALIGNMENT, Arena
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier
from kvcache.unit_layout import TensorSlot

NUM_THREADS = 64
"""Each waits for one read at a time, behind the megabytes that are read ahead: 256 rows of a table
take 45 ms so, 85 with 32 threads and 460 with 4, on an NVMe volume of 3 GB/s that is kept busy."""
SCRATCH_BYTES = 4 << 20
"""Of all threads together; fewer read where rows are longer."""
MAX_EXTENT_BYTES = SCRATCH_BYTES // NUM_THREADS


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, stop) of a unit, 4096-aligned, that cover the rows ``ids[first:end]``."""

    start: int
    stop: int
    first: int
    end: int


def plan_extents(ids: Sequence[int], offset: int, row_bytes: int, max_bytes: int) -> list[Extent]:
    """Cover the rows ``ids`` (ascending, distinct) of a table at ``offset`` with few aligned
    extents.

    Rows whose pages touch share an extent, up to ``max_bytes``.
    """
    extents: list[Extent] = []
    for position, row in enumerate(ids):
        begin = offset + row * row_bytes
        start = begin // ALIGNMENT * ALIGNMENT
        stop = -(-(begin + row_bytes) // ALIGNMENT) * ALIGNMENT
        last = extents[-1] if extents else None
        if last is not None and start <= last.stop and stop - last.start <= max_bytes:
            extents[-1] = Extent(last.start, stop, last.first, position + 1)
        else:
            extents.append(Extent(start, stop, position, position + 1))
    return extents


class RowReader:
    """Many threads, each with its own part of a small scratch buffer. One `read` at a time."""

    def __init__(self, store: ShardStore, max_row_bytes: int) -> None:
        """``max_row_bytes``: of the longest row that will be read."""
        self._store = store
        num_bytes = max(SCRATCH_BYTES, _covering(max_row_bytes))
        self._arena = Arena(Tier.HOST, num_bytes)
        self._scratch = self._arena.allocate(num_bytes)
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="rows")

    def read(self, unit: str, slot: TensorSlot, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows ``ids`` [n] of a table as [n, ...] in CPU memory, and the bytes read from the
        disk.

        A row that occurs twice is read once. Raises IndexError for a row the table does not have,
        StorageError where a read fails.
        """
        unique, inverse = torch.unique(ids.cpu(), return_inverse=True)
        if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < slot.shape[0]:
            raise IndexError(
                f"{slot.name} has rows 0 to {slot.shape[0] - 1}, "
                f"not {int(unique[0])} to {int(unique[-1])}"
            )
        row_bytes = slot.num_bytes // slot.shape[0]
        rows = torch.empty(unique.numel(), row_bytes, dtype=torch.uint8)
        wanted: list[int] = unique.tolist()
        extent_bytes = max(MAX_EXTENT_BYTES, _covering(row_bytes))
        assert extent_bytes <= self._scratch.numel(), "the reader was made for shorter rows"
        extents = plan_extents(wanted, slot.offset, row_bytes, extent_bytes)
        num_threads = min(NUM_THREADS, self._scratch.numel() // extent_bytes, len(extents))

        def work(index: int) -> None:
            scratch = self._scratch[index * extent_bytes :]
            for extent in extents[index::num_threads]:
                part = scratch[: extent.stop - extent.start]
                self._store.read_part(unit, extent.start, part)
                for position in range(extent.first, extent.end):
                    begin = slot.offset + wanted[position] * row_bytes - extent.start
                    rows[position].copy_(part[begin : begin + row_bytes])

        futures = [self._pool.submit(work, index) for index in range(num_threads)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        table = rows.view(-1).view(slot.dtype).view(-1, *slot.shape[1:])
        return table[inverse], sum(extent.stop - extent.start for extent in extents)

    def verify_first_read(self, unit: str) -> None:
        """Check a whole unit, which is never read at once, if the store checks reads."""
        self._store.verify_first_read(self._scratch, unit)

    def close(self) -> None:
        """End the threads and give the scratch memory back. Idempotent."""
        self._pool.shutdown(wait=True)
        self._arena.close()


def _covering(row_bytes: int) -> int:
    """Whole pages that hold a row, wherever in a page it begins."""
    return (-(-row_bytes // ALIGNMENT) + 1) * ALIGNMENT
