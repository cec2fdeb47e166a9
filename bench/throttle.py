"""A disk made slower for one process, by the block-I/O controller of cgroup v1 or v2."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

V1 = Path("/sys/fs/cgroup/blkio")
V2 = Path("/sys/fs/cgroup")
REMOVAL_TIMEOUT_S = 10.0


class Throttle:
    """Limits what ``pid``, and what it starts from then on, read from the disk of ``folder`` to
    ``bytes_per_s``, until it is closed.

    Raises OSError where this user may not, or the kernel has no such controller.
    """

    def __init__(self, name: str, pid: int, folder: Path, bytes_per_s: float) -> None:
        device = os.stat(folder).st_dev
        disk = f"{os.major(device)}:{os.minor(device)}"
        on_v1 = (V1 / "blkio.throttle.read_bps_device").exists()
        self._root = V1 if on_v1 else V2
        self._group = self._root / f"giantserve-bench-{os.getpid()}-{name}"
        self._group.mkdir()
        self._limit = self._group / ("blkio.throttle.read_bps_device" if on_v1 else "io.max")
        self._unlimited = f"{disk} 0" if on_v1 else f"{disk} rbps=max"
        self._limit.write_text(f"{disk} {'' if on_v1 else 'rbps='}{int(bytes_per_s)}")
        (self._group / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Let the processes read freely again. Idempotent."""
        if not self._group.exists():
            return
        self._limit.write_text(self._unlimited)  # what waits goes on
        give_up_s = time.monotonic() + REMOVAL_TIMEOUT_S
        while True:
            for pid in (self._group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (self._root / "cgroup.procs").write_text(pid)
            try:
                return self._group.rmdir()
            except OSError:  # a process that has been killed is in it for a moment
                if time.monotonic() > give_up_s:
                    raise
            time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
