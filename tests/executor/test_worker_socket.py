"""What the kernel does with a worker's connection."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Client, Listener

from giantserve.executor.worker_socket import set_options


def test_a_lost_node_is_found_within_a_minute() -> None:
    with (
        Listener(("127.0.0.1", 0)) as listener,
        Client(listener.address) as connection,
    ):
        set_options(connection)
        with socket.socket(fileno=os.dup(connection.fileno())) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle_s, period_s, number = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle_s + period_s * number <= 60
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
