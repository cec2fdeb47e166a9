"""A circular buffer of contiguous extents of varying size. Bookkeeping only: offsets, no bytes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise


@dataclass(slots=True)
class _Extent:
    start: int
    stop: int
    is_free: bool = False


class Ring:
    """Hands out extents in order. They may be freed in any order; space
    returns from both ends, so that an extent held for long delays only what lies between.

    An extent never wraps: where the end of the buffer is too short for it, it starts over at 0.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}; it must be 0 or more")
        self.capacity = capacity
        self._extents: deque[_Extent] = deque()

    def allocate(self, size: int) -> int | None:
        """The offset of ``size`` free bytes, or None while there is no such room."""
        start = self._place(size)
        if start is not None:
            self._extents.append(_Extent(start, start + size))
        return start

    def free(self, start: int) -> None:
        """Give the extent at ``start`` back; ValueError if none is held there."""
        for extent in self._extents:
            if extent.start == start and not extent.is_free:
                extent.is_free = True
                break
        else:
            raise ValueError(f"no extent is held at {start}")
        while self._extents and self._extents[0].is_free:
            self._extents.popleft()
        while self._extents and self._extents[-1].is_free:
            self._extents.pop()

    @property
    def num_held(self) -> int:
        """How many extents are not freed yet."""
        return sum(not extent.is_free for extent in self._extents)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the extents are disjoint and in ring order."""
        spans = sorted((extent.start, extent.stop) for extent in self._extents)
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), spans
        assert all(0 <= start < stop <= self.capacity for start, stop in spans), spans
        starts = [extent.start for extent in self._extents]
        wraps = sum(later < earlier for earlier, later in pairwise(starts))
        assert wraps <= 1, starts

    def _place(self, size: int) -> int | None:
        if not 0 < size <= self.capacity:
            return None
        if not self._extents:
            return 0
        head, tail = self._extents[0].start, self._extents[-1].stop
        if self._extents[-1].start < head:
            return tail if tail + size <= head else None
        if tail + size <= self.capacity:
            return tail
        return 0 if size <= head else None
