"""A disk made slower for one process, by the block-I/O controller of cgroup v1 or v2."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

V1 = Path("/sys/fs/cgroup/blkio")
V2 = Path("/sys/fs/cgroup")


class Throttle:
    """Limits what ``pid`` reads from the disk of ``folder`` to ``bytes_per_s``, until it is closed.

    Raises OSError where this user may not, or the kernel has no such controller.
    """

    def __init__(self, name: str, pid: int, folder: Path, bytes_per_s: float) -> None:
        device = os.stat(folder).st_dev
        disk = f"{os.major(device)}:{os.minor(device)}"
        on_v1 = (V1 / "blkio.throttle.read_bps_device").exists()
        root = V1 if on_v1 else V2
        self._root = root
        self._pid = pid
        self._group = root / f"giantserve-bench-{os.getpid()}-{name}"
        self._group.mkdir()
        if on_v1:
            (self._group / "blkio.throttle.read_bps_device").write_text(
                f"{disk} {int(bytes_per_s)}"
            )
        else:
            (self._group / "io.max").write_text(f"{disk} rbps={int(bytes_per_s)}")
        (self._group / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Let the process read freely again. Idempotent."""
        if not self._group.exists():
            return
        if Path(f"/proc/{self._pid}").exists():
            (self._root / "cgroup.procs").write_text(str(self._pid))
        self._group.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
