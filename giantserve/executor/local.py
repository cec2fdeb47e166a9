"""Workers as processes of this machine; no Ray needed."""

from __future__ import annotations

import contextlib
import time

from giantserve.errors import EngineDeadError
from giantserve.executor.base import Executor, ProgressCallback
from giantserve.executor.launcher import Launcher
from giantserve.shard_spec import ShardSpec

LOOPBACK = "127.0.0.1"
STOP_TIMEOUT_S = 10.0


class LocalExecutor(Executor):
    """Forks its workers from a `Launcher`: its own, or one that is handed in and outlives it."""

    def __init__(
        self,
        specs: list[ShardSpec],
        on_progress: ProgressCallback,
        launcher: Launcher | None = None,
    ) -> None:
        self._own_launcher = launcher is None
        self._launcher = launcher or Launcher()
        self._pids: list[int] = []
        super().__init__(specs, LOOPBACK, on_progress)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids by rank."""
        return self._pids

    def _start_workers(self, address: tuple[str, int], authkey: bytes, count: int) -> None:
        for rank in range(count):
            self._pids.append(self._launcher.launch(address, authkey, rank))

    def _worker_host(self, rank: int) -> str:
        return LOOPBACK

    def _has_ended(self, rank: int) -> bool:
        return self._launcher.exit_status(self._pids[rank]) is not None

    def _why_gone(self, rank: int) -> str:
        deadline = time.monotonic() + 1.0
        while (status := self._launcher.exit_status(self._pids[rank])) is None:
            if time.monotonic() > deadline:
                return "its connection closed"
            time.sleep(0.01)
        return f"its process ended with {status}"

    def _end_workers(self) -> None:
        deadline = time.monotonic() + (0.0 if self._broken else STOP_TIMEOUT_S)
        with contextlib.suppress(EngineDeadError):  # without a launcher they end by themselves
            for pid in self._pids:
                while self._launcher.exit_status(pid) is None:
                    if time.monotonic() > deadline:
                        self._launcher.kill(pid)
                    time.sleep(0.005)
        if self._own_launcher:
            self._launcher.close()
