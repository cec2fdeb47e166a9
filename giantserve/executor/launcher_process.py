"""Forks workers from one process that has everything imported.

Importing torch and transformers takes seconds; forking takes milliseconds and shares the memory of
what was imported. The launcher dies with the process that started it, and takes its workers along;
a client that goes, goes with those it started.

python -m giantserve.executor.launcher_process SOCKET [LISTENING]   (started by `Launcher`; both
are descriptors)
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from giantserve.errors import EngineDeadError
from giantserve.executor.launcher_messages import Called, Kill, Launch, Poll, Run

IMPORT_NICENESS = 10

_RUNNING = None
"""The status of a worker that has not ended."""


class _LauncherProcess:
    """Answers its clients one request after the other; ends when the first client goes."""

    def __init__(self, owner: Connection[Any, Any], listening: socket.socket | None) -> None:
        self._owner = owner
        self._listening = listening
        self._workers: dict[Connection[Any, Any], dict[int, str | None]] = {owner: {}}
        """By client: the workers it started, each with how it ended."""
        self._calls: dict[Connection[Any, Any], tuple[Connection[Any, Any], int]] = {}
        """By the pipe on which the answer comes: the client and the process."""

    def serve(self) -> None:
        while self._owner in self._workers:
            sources: list[Any] = [*self._workers, *self._calls]
            if self._listening is not None:
                sources.append(self._listening)
            for ready in wait(sources):
                if isinstance(ready, socket.socket):
                    joining, _ = ready.accept()
                    self._workers[Connection(joining.detach())] = {}
                elif ready in self._calls:
                    self._hand_on(ready)
                elif ready in self._workers:
                    self._obey(ready)
        for client in list(self._workers):
            self._forget(client)

    def _obey(self, client: Connection[Any, Any]) -> None:
        try:
            request = client.recv()
            if isinstance(request, Run):
                self._call(client, request)
            else:
                client.send(self._answer(self._workers[client], request))
        except (EOFError, OSError):
            self._forget(client)

    def _answer(self, workers: dict[int, str | None], request: Any) -> Any:
        if isinstance(request, Launch):
            pid = self._fork(lambda: _work(request))
            workers[pid] = _RUNNING
            return pid
        _reap(workers)
        if isinstance(request, Poll):
            return workers.get(request.pid)
        if isinstance(request, Kill):
            if workers.get(request.pid, "gone") is _RUNNING:
                os.kill(request.pid, signal.SIGKILL)
            return None
        raise AssertionError(f"unexpected request {request!r}")

    def _call(self, client: Connection[Any, Any], request: Run) -> None:
        ours, theirs = (Connection(end) for end in os.pipe())
        pid = self._fork(lambda: _run(request, theirs))
        theirs.close()
        self._calls[ours] = client, pid

    def _hand_on(self, pipe: Connection[Any, Any]) -> None:
        client, pid = self._calls.pop(pipe)
        try:
            answer = pipe.recv_bytes()
        except (EOFError, OSError):
            answer = pickle.dumps(Called(error=EngineDeadError("a helper process has died")))
        pipe.close()
        os.waitpid(pid, 0)
        with contextlib.suppress(OSError):  # the client will be found gone
            client.send_bytes(answer)

    def _fork(self, body: Callable[[], None]) -> int:
        """A child that runs ``body`` with none of the launcher's connections: it would hold them
        open."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            for connection in (*self._workers, *self._calls):
                connection.close()
            if self._listening is not None:
                self._listening.close()
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _forget(self, client: Connection[Any, Any]) -> None:
        """End what a client that is gone has started."""
        workers = self._workers.pop(client)
        _reap(workers)
        calls = [pipe for pipe, (caller, _) in self._calls.items() if caller is client]
        running = [pid for pid, status in workers.items() if status is _RUNNING]
        for pipe in calls:
            running.append(self._calls.pop(pipe)[1])
            pipe.close()
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        client.close()


def _work(request: Launch) -> None:
    from giantserve.executor.worker import run_worker

    os.environ.clear()
    os.environ.update(request.environment)
    run_worker(request.address, request.authkey, request.rank)


def _run(request: Run, answer: Connection[Any, Any]) -> None:
    try:
        function, args, kwargs = pickle.loads(request.payload)
        called = Called(payload=_pickled(function(*args, **kwargs)))
    except Exception as error:  # for the caller, where it can travel
        called = Called(error=error)
    try:
        message = pickle.dumps(called)
        pickle.loads(message)
    except Exception:
        message = pickle.dumps(Called(error=EngineDeadError(f"{called.error!r}")))
    answer.send_bytes(message)


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:  # which pickling raises in many kinds
        raise pickle.PicklingError(f"the answer does not pickle: {error}") from None


def _reap(workers: dict[int, str | None]) -> None:
    for pid, status in workers.items():
        if status is not _RUNNING:
            continue
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            ended = os.WTERMSIG(code) if os.WIFSIGNALED(code) else None
            workers[pid] = f"signal {ended}" if ended else f"status {os.WEXITSTATUS(code)}"


def run_to_its_end(body: Callable[[], None]) -> None:
    """Run ``body`` in a thread, until the kernel has done with that.

    Python's join returns before a thread's own destructors run. A fork meanwhile would copy what
    locks they hold, such as that of MKL's memory, and nobody in the child would ever free them.
    """
    thread = threading.Thread(target=body)
    thread.start()
    task = Path(f"/proc/self/task/{thread.native_id}")
    thread.join()
    while task.exists():
        time.sleep(0.001)


def _import() -> None:
    """What workers need. A thread has a niceness of its own, and this one gives way: whoever
    started the launcher has more to start, and waits for that."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), IMPORT_NICENESS)
    import_module("giantserve.executor.worker")


def main() -> None:
    """Import, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what a worker prints is no output of the program that started it
    owner, *listening = (int(argument) for argument in sys.argv[1:])
    run_to_its_end(_import)
    accepting = socket.socket(fileno=listening[0]) if listening else None
    _LauncherProcess(Connection(owner), accepting).serve()


if __name__ == "__main__":
    main()
