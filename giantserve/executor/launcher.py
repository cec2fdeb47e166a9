"""A handle on the process that forks workers: see `launcher_process`.

A server starts one for its machine and names its socket in the environment, where Ray's processes
find it: a replica that starts anew, or its shards, then pay for no imports.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from giantserve.errors import EngineDeadError
from giantserve.executor.launcher_messages import Called, Kill, Launch, Poll, Run

ENVIRONMENT_NAME = "GIANTSERVE_LAUNCHER"
"""The socket of the machine's launcher, for `node_launcher`."""

STOP_TIMEOUT_S = 10.0
LEAST_AGE_S = 60.0
"""Of a socket that is taken for dead: one that was just bound does not listen yet."""

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class Launcher:
    """A connection to a launcher process. Closing it ends every worker started over it, and the
    process itself where this handle started it. For one thread at a time."""

    def __init__(self, listen: Path | None = None) -> None:
        """Start a launcher process, which imports what workers need while this returns at once.

        With ``listen``, other processes of this user may `connect` to the socket of that path; its
        folder is to be private.
        """
        ours, theirs = socket.socketpair()
        listening = None if listen is None else _listen(listen)
        passed = [theirs, *([] if listening is None else [listening])]
        descriptors = [each.fileno() for each in passed]
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "giantserve.executor.launcher_process", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            process_group=0,
        )
        for each in passed:
            each.close()
        self._connection: Connection[Any, Any] = Connection(ours.detach())

    @classmethod
    def connect(cls, path: Path) -> Launcher:
        """Join a launcher that listens. Raises OSError where none does."""
        joined = socket.socket(socket.AF_UNIX)
        try:
            joined.connect(str(path))
        except OSError:
            joined.close()
            raise
        launcher = cls.__new__(cls)
        launcher._process = None
        launcher._connection = Connection(joined.detach())
        return launcher

    def launch(self, address: tuple[str, int], authkey: bytes, rank: int) -> int:
        """Fork a worker that connects to ``address``, with this process's environment; returns its
        process id."""
        request = Launch(address=address, authkey=authkey, rank=rank, environment=dict(os.environ))
        return int(self._ask(request))

    def exit_status(self, pid: int) -> str | None:
        """How the worker ended ("signal 9", "status 1"), or None while it runs."""
        status: str | None = self._ask(Poll(pid))
        return status

    def kill(self, pid: int) -> None:
        """End a worker at once."""
        self._ask(Kill(pid))

    def run(
        self,
        function: Callable[Parameters, Answer],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Answer:
        """What ``function`` returns in a fork of the launcher; raises what it raises there.

        The function and its arguments must pickle; PicklingError where the answer does not.
        """
        payload = pickle.dumps((function, args, kwargs), protocol=pickle.HIGHEST_PROTOCOL)
        called: Called = self._ask(Run(payload))
        if called.error is not None:
            raise called.error
        answer: Answer = pickle.loads(called.payload)
        return answer

    def _ask(self, request: Any) -> Any:
        try:
            self._connection.send(request)
            return self._connection.recv()
        except (EOFError, OSError):
            raise EngineDeadError("the process that starts the workers has ended") from None

    def close(self) -> None:
        """End the workers, and the launcher where it is our own. Idempotent."""
        if not self._connection.closed:
            self._connection.close()
        if self._process is None:
            return
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def remove_dead(sockets: Iterable[Path]) -> None:
    """Remove the folders of ``sockets`` of this user to which no launcher listens any more, as a
    server that was killed leaves them."""
    for path in sockets:
        with contextlib.suppress(OSError):
            found = path.stat()
            is_ours = found.st_uid == os.getuid() and stat.S_ISSOCK(found.st_mode)
            if is_ours and time.time() - found.st_mtime > LEAST_AGE_S and not _answers(path):
                shutil.rmtree(path.parent)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        return asking.connect_ex(str(path)) != errno.ECONNREFUSED


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    return listening


def node_launcher() -> Launcher | None:
    """A connection to this machine's launcher; None where there is none."""
    path = os.environ.get(ENVIRONMENT_NAME)
    if path is None:
        return None
    try:
        return Launcher.connect(Path(path))
    except OSError as error:
        logger.warning("no launcher at %s (%s): workers import for themselves", path, error)
        return None


def run_beside(
    function: Callable[Parameters, Answer], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Answer:
    """What ``function`` returns, in a fork of this machine's launcher if there is one, else here.

    For what needs torch or transformers in a process that does not.
    """
    launcher = node_launcher()
    if launcher is None:
        return function(*args, **kwargs)
    with contextlib.closing(launcher):
        return launcher.run(function, *args, **kwargs)
