"""How fast a folder's disk reads and writes, by the size of requests: a temporary file, a few
threads.

The buffers lie in huge pages, as those of weights do: into pages of 4 KiB the same disk was seen to
read 1.3 GB/s instead of 4.1, since a request is cut into as many segments as it has pages.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from partition.bandwidths import DiskRate

REQUEST_BYTES = 8 << 20
BLOCK_BYTES = (16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
"""Of the smaller requests, such as those of a layer's KV or of an expert."""
NUM_THREADS = 4
FILE_BYTES = 512 << 20
TIME_LIMIT_S, BLOCK_TIME_LIMIT_S = 0.8, 0.2
READS_PER_BYTE = 100
STRIDE = 7919
"""A prime: every such block of the file comes once before any comes again, none beside the one
before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Bytes/s of large requests and, by rising size, of smaller ones all over the file. ``direct``
    is False where the file system refuses O_DIRECT: then pages were dropped from the cache before
    reading, and the rates include the copy through it."""

    read: float
    write: float
    blocks: tuple[DiskRate, ...]
    direct: bool


def probe_disk(folder: Path) -> DiskRates:
    """Measure ``folder``'s disk in at most about 5 s; the file is gone afterwards. Raises OSError
    where ``folder`` cannot be written or is full."""
    descriptor, name = tempfile.mkstemp(prefix=".giantserve-probe-", dir=folder)
    os.close(descriptor)
    try:
        with _opened(name) as (file, direct):
            room = os.statvfs(folder)
            size = min(FILE_BYTES, room.f_bavail * room.f_frsize // 4)
            written, write_rate = _write(file, size, REQUEST_BYTES, 1, TIME_LIMIT_S)
            size = written  # what there is to read
            _read(file, size, REQUEST_BYTES, 1, TIME_LIMIT_S)  # a pass reads what one before it did
            read_rate = _read(file, size, REQUEST_BYTES, 1, TIME_LIMIT_S)
            blocks = tuple(
                DiskRate(
                    block_bytes=block,
                    read=_read(file, size, block, STRIDE, BLOCK_TIME_LIMIT_S),
                    write=_write(file, size, block, STRIDE, BLOCK_TIME_LIMIT_S)[1],
                )
                for block in BLOCK_BYTES
            )
            return DiskRates(read=read_rate, write=write_rate, blocks=blocks, direct=direct)
    finally:
        os.unlink(name)


def _write(file: int, num_bytes: int, block: int, stride: int, limit_s: float) -> tuple[int, float]:
    """Write so many bytes once, or what the time allows: (bytes, bytes/s)."""
    count = max(1, num_bytes // block)

    def request(i: int, data: memoryview) -> int:
        return os.pwrite(file, data, i * stride % count * block)

    written, seconds = _spread(count, block, request, limit_s)
    start = time.perf_counter()
    os.fsync(file)
    return written, written / (seconds + time.perf_counter() - start)


def _read(file: int, num_bytes: int, block: int, stride: int, limit_s: float) -> float:
    """Bytes/s of reading so many bytes, over and over."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    count = num_bytes // block

    def request(i: int, data: memoryview) -> int:
        return os.preadv(file, [data], i * stride % count * block)

    read, seconds = _spread(READS_PER_BYTE * count, block, request, limit_s)
    return read / seconds


@contextmanager
def _opened(name: str) -> Iterator[tuple[int, bool]]:
    direct = True
    try:
        file = os.open(name, os.O_RDWR | os.O_DIRECT)
    except OSError:
        file, direct = os.open(name, os.O_RDWR), False
    try:
        yield file, direct
    finally:
        os.close(file)


def _spread(
    count: int, block: int, request: Callable[[int, memoryview], int], limit_s: float
) -> tuple[int, float]:
    """Run requests 0, 1, ... of ``block`` bytes on the threads, in order, until ``count`` or the
    time limit: (bytes, seconds).

    What is done is a prefix: a thread takes the next request only while there is time.
    """
    start = time.perf_counter()
    numbers = iter(range(count))

    def work(_: int) -> int:
        done = 0
        with (
            mmap.mmap(-1, REQUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
            memoryview(memory) as whole,
            whole[:block] as data,
        ):
            memory.madvise(mmap.MADV_HUGEPAGE)  # as an arena's: a page is a segment of the request
            memory.write(os.urandom(4096) * (REQUEST_BYTES // 4096))
            for number in numbers:
                moved = request(number, data)
                if moved != block:
                    raise OSError(f"the disk moved {moved} of {block} bytes")
                done += moved
                if time.perf_counter() - start > limit_s:
                    break
        return done

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        moved = sum(pool.map(work, range(NUM_THREADS)))
    return moved, time.perf_counter() - start
