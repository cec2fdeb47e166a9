"""TCP ports that nobody listens on."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

FIRST, LAST = 20_000, 32_767
"""Above the ports of Ray's workers (10,002 to 19,999) and below those that Linux gives to outgoing
connections (32,768 and up), one of which could take a port between its choice and its use."""


def free_ports(count: int) -> list[int]:
    """Different ports that were free a moment ago, on every address of this machine.

    Raises OSError where there are none.
    """
    free: list[int] = []
    with ExitStack() as held:
        for port in random.sample(range(FIRST, LAST + 1), LAST + 1 - FIRST):
            try:
                held.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
            free.append(port)
            if len(free) == count:
                return free
    raise OSError(f"fewer than {count} free ports between {FIRST} and {LAST}")


def free_port() -> int:
    """One of them. Raises OSError where there is none."""
    return free_ports(1)[0]
