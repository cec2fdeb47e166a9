"""A memory cgroup (v1 or v2) around child processes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class MemoryBox:
    """Processes started in it share ``limit_bytes`` of memory, page cache included.

    Raises OSError where this user may not make one.
    """

    def __init__(self, limit_bytes: int) -> None:
        on_v1 = (V1 / "memory.limit_in_bytes").exists()
        self._group = (V1 if on_v1 else V2) / f"giantserve-bench-{os.getpid()}"
        self._group.mkdir()
        name = "memory.limit_in_bytes" if on_v1 else "memory.max"
        (self._group / name).write_text(str(limit_bytes))

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        """Run it in the box, with nothing of any file in the page cache; its output as text."""
        os.sync()
        DROP_CACHES.write_text("3")

        def enter() -> None:
            (self._group / "cgroup.procs").write_text(str(os.getpid()))

        return subprocess.run(
            command, preexec_fn=enter, capture_output=True, text=True, check=False, **options
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(100):
            try:
                return self._group.rmdir()
            except OSError:  # a process is still on its way out
                time.sleep(0.1)
        self._group.rmdir()
