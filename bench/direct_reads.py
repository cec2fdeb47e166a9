"""Sequential O_DIRECT reads of one file, as fio makes them: blocks of one size, some at a time."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_SIZES = (1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20)
DEPTHS = (1, 2, 3, 4, 8)


def read_rate(path: Path, num_bytes: int, block_bytes: int, depth: int) -> float:
    """Bytes/s of reading the first ``num_bytes`` of ``path`` with ``depth`` reads in flight."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with ThreadPoolExecutor(depth) as pool:
            numbers = iter(range(num_bytes // block_bytes))
            begin = time.perf_counter()
            read = sum(pool.map(lambda _: _reads(file, numbers, block_bytes), range(depth)))
            return read / (time.perf_counter() - begin)
    finally:
        os.close(file)


def _reads(file: int, numbers: Iterator[int], block_bytes: int) -> int:
    read = 0
    with mmap.mmap(
        -1, block_bytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as room:
        room.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(room)[:block_bytes] as block:
            for number in numbers:
                read += os.preadv(file, [block], number * block_bytes)
    return read


def best_settings(path: Path, num_bytes: int) -> tuple[int, int]:
    """The block size and depth that read fastest."""
    settings = [(size, depth) for size in BLOCK_SIZES for depth in DEPTHS]
    return max(settings, key=lambda setting: read_rate(path, num_bytes, *setting))
