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

NUM_THREADS = 4
SCRATCH_BYTES = 256 << 10


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
    """A few threads, each with a small scratch buffer of its own. One `read` at a time."""

    def __init__(self, store: ShardStore, max_row_bytes: int) -> None:
        self._store = store
        row_pages = -(-max_row_bytes // ALIGNMENT) + 1
        self._scratch_bytes = max(SCRATCH_BYTES, row_pages * ALIGNMENT)
        self._arena = Arena(Tier.HOST, NUM_THREADS * self._scratch_bytes)
        self._scratch = [self._arena.allocate(self._scratch_bytes) for _ in range(NUM_THREADS)]
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
        extents = plan_extents(wanted, slot.offset, row_bytes, self._scratch_bytes)

        def work(index: int) -> None:
            scratch = self._scratch[index]
            for extent in extents[index::NUM_THREADS]:
                part = scratch[: extent.stop - extent.start]
                self._store.read_part(unit, extent.start, part)
                for position in range(extent.first, extent.end):
                    begin = slot.offset + wanted[position] * row_bytes - extent.start
                    rows[position].copy_(part[begin : begin + row_bytes])

        futures = [
            self._pool.submit(work, index) for index in range(min(NUM_THREADS, len(extents)))
        ]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        table = rows.view(-1).view(slot.dtype).view(-1, *slot.shape[1:])
        return table[inverse], sum(extent.stop - extent.start for extent in extents)

    def verify_first_read(self, unit: str) -> None:
        """Check a whole unit, which is never read at once, if the store checks reads."""
        self._store.verify_first_read(self._scratch[0], unit)

    def close(self) -> None:
        """End the threads and give the scratch memory back. Idempotent."""
        self._pool.shutdown(wait=True)
        self._arena.close()
