"""Socket settings shared by both ends of a worker's connection."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection
from typing import Any


def set_no_delay(connection: Connection[Any, Any]) -> None:
    """Send small messages at once instead of waiting to fill a packet (Nagle)."""
    with socket.socket(fileno=os.dup(connection.fileno())) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
