"""A server in a session of its own, so that a signal to the shell's job reaches only its parent."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def in_own_session(serve: Callable[[], int]) -> int:
    """Fork; run ``serve`` in the child, in a new session, and return its exit status in both.

    A signal to the whole process group (Ctrl-C, ``timeout``, a closing terminal) would end Ray's
    processes before the server could shut them down; here the parent takes it and hands on one
    SIGTERM. The child gets the same where the parent is killed. Call it before any thread runs.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child = os.fork()
    if child == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return serve()

    def hand_on(signum: int, frame: FrameType | None) -> None:
        os.kill(child, signal.SIGTERM)

    for signum in STOP_SIGNALS:
        signal.signal(signum, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
