"""The server of the demonstration: a process of its own, whose end takes everything along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from giantserve.errors import EngineDeadError
from giantserve.free_ports import free_port

STOP_TIMEOUT_S = 30.0


class Server:
    """``python -m deployments`` on a free port. Its progress and its errors go to our stderr.

    Entering waits until it answers, raising EngineDeadError where it ends instead. Leaving stops
    it and every process below it, by force where it takes more than ``STOP_TIMEOUT_S``.
    """

    def __init__(self, model: Path, options: Mapping[str, object], port: int | None = None) -> None:
        self._port = port or free_port()
        self._command = [sys.executable, "-m", "deployments", str(model)]
        self._command += [f"{name}={value}" for name, value in options.items()]
        self._command += [f"--port={self._port}"]
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        # A session of its own: a Ctrl-C in the terminal is ours to pass on, once.
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            assert self._process.stdout is not None
            if not any(line.startswith("ready:") for line in self._process.stdout):
                code = self._process.wait()
                raise EngineDeadError(f"the server ended with status {code} before it was ready")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server; nothing that it started is left. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        everyone = _family(process.pid)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            everyone += _family(process.pid)
            process.kill()
            process.wait()
        _, left = psutil.wait_procs(everyone, timeout=5.0)
        for other in left:
            other.kill()
        psutil.wait_procs(left, timeout=5.0)
        assert process.stdout is not None
        process.stdout.close()


def _family(pid: int) -> list[psutil.Process]:
    """Everything below a process. psutil tells a process from a later one of the same id."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
