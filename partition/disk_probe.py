"""How fast a folder's disk reads and writes: a temporary file, 8 MiB requests, a few threads.

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

REQUEST_BYTES = 8 << 20
NUM_THREADS = 4
FILE_BYTES = 512 << 20
TIME_LIMIT_S = 0.8
READS_PER_BYTE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Bytes/s. ``direct`` is False where the file system refuses O_DIRECT: then pages were dropped
    from the cache before reading, and the rates include the copy through it."""

    read: float
    write: float
    direct: bool


def probe_disk(folder: Path) -> DiskRates:
    """Measure ``folder``'s disk in at most about 3 s; the file is gone afterwards. Raises OSError
    where ``folder`` cannot be written or is full."""
    descriptor, name = tempfile.mkstemp(prefix=".giantserve-probe-", dir=folder)
    os.close(descriptor)
    try:
        with _opened(name) as (file, direct):
            room = os.statvfs(folder)
            size = min(FILE_BYTES, room.f_bavail * room.f_frsize // 4)
            count = max(1, size // REQUEST_BYTES)
            written, write_s = _spread(
                count, lambda i, data: os.pwrite(file, data, i * REQUEST_BYTES)
            )
            start = time.perf_counter()
            os.fsync(file)
            write_s += time.perf_counter() - start
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            stored = written // REQUEST_BYTES

            def request(i: int, data: mmap.mmap) -> int:
                return os.preadv(file, [data], i % stored * REQUEST_BYTES)

            _spread(stored, request)  # a pass reads what the one before it read
            read, read_s = _spread(READS_PER_BYTE * stored, request)
            return DiskRates(read=read / read_s, write=written / write_s, direct=direct)
    finally:
        os.unlink(name)


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


def _spread(count: int, request: Callable[[int, mmap.mmap], int]) -> tuple[int, float]:
    """Run requests 0, 1, ... on the threads, in order, until ``count`` or the time limit: (bytes,
    seconds).

    What is done is a prefix: a thread takes the next request only while there is time.
    """
    start = time.perf_counter()
    numbers = iter(range(count))

    def work(_: int) -> int:
        done = 0
        with mmap.mmap(-1, REQUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as data:
            data.madvise(mmap.MADV_HUGEPAGE)  # as an arena's: a page is a segment of the request
            data.write(os.urandom(4096) * (REQUEST_BYTES // 4096))
            for number in numbers:
                moved = request(number, data)
                if moved != REQUEST_BYTES:
                    raise OSError(f"the disk moved {moved} of {REQUEST_BYTES} bytes")
                done += moved
                if time.perf_counter() - start > TIME_LIMIT_S:
                    break
        return done

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        moved = sum(pool.map(work, range(NUM_THREADS)))
    return moved, time.perf_counter() - start
