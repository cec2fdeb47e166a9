"""Starts workers on this machine by forking one process that has everything imported.

Importing torch and transformers takes seconds; forking takes milliseconds and shares the memory of
what was imported. The launcher dies with the process that started it, and takes its workers along.

python -m giantserve.executor.launcher    (started by `Launcher`; speaks JSON lines)
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import Any

from giantserve.errors import EngineDeadError

STOP_TIMEOUT_S = 10.0


class Launcher:
    """A handle on the launcher process. `close` ends it and every worker that still runs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "giantserve.executor.launcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def launch(self, address: tuple[str, int], authkey: bytes, rank: int) -> int:
        """Fork a worker that connects to ``address``; returns its process id."""
        request = {"address": list(address), "authkey": authkey.hex(), "rank": rank}
        return int(self._ask(request)["pid"])

    def exit_status(self, pid: int) -> str | None:
        """How the worker ended ("signal 9", "status 1"), or None while it runs."""
        status: str | None = self._ask({"poll": pid})["status"]
        return status

    def kill(self, pid: int) -> None:
        """End a worker at once."""
        self._ask({"kill": pid})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = b""
        if not line:
            raise EngineDeadError("the process that starts the workers has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the launcher and its workers. Idempotent."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _main() -> None:
    """Fork a worker for each request line; end with the last line."""
    from giantserve.executor.worker import run_worker

    children: dict[int, str | None] = {}
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a worker prints must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pending = b""
    while True:
        select.select([0], [], [])
        data = os.read(0, 65536)
        if not data:
            break
        pending += data
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            request = json.loads(line)
            if "poll" in request:
                _reap(children)
                replies.write(json.dumps({"status": children.get(request["poll"])}) + "\n")
                continue
            if "kill" in request:
                _reap(children)
                if children.get(request["kill"], "gone") is None:
                    os.kill(request["kill"], signal.SIGKILL)
                replies.write("{}\n")
                continue
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.close(0)
                    replies.close()
                    address = (request["address"][0], request["address"][1])
                    run_worker(address, bytes.fromhex(request["authkey"]), request["rank"])
                    code = 0
                finally:
                    os._exit(code)
            children[pid] = None
            replies.write(json.dumps({"pid": pid}) + "\n")
    _reap(children)
    for pid, status in children.items():
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _reap(children: dict[int, str | None]) -> None:
    for pid, status in children.items():
        if status is not None:
            continue
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            ended = os.WTERMSIG(code) if os.WIFSIGNALED(code) else None
            children[pid] = f"signal {ended}" if ended else f"status {os.WEXITSTATUS(code)}"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # whoever started us is gone, and so are we
        _main()
