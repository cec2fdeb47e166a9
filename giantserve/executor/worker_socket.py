"""Socket settings shared by both ends of a worker's connection."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection
from typing import Any

KEEPALIVE_AFTER_S, KEEPALIVE_PERIOD_S, NUM_KEEPALIVES = 20, 10, 4


def set_options(connection: Connection[Any, Any]) -> None:
    """Send small messages at once instead of waiting to fill a packet (Nagle), and end the
    connection when the other's node has not answered the kernel's probes for a minute.

    No TCP_USER_TIMEOUT: it would end that of a process, too, that is stopped for a while (by a
    debugger, say) while more than its buffer takes waits to be read.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PERIOD_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_KEEPALIVES)
