"""A worker's end of its connection."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection, Listener
from typing import Any

import pytest

from giantserve.executor.worker import EngineConnection

LARGE = 64 << 20
"""Bytes, more than the buffers of two sockets."""


def test_what_the_engine_sends_is_read_while_the_worker_does_something_else() -> None:
    with Listener(("127.0.0.1", 0), authkey=b"key") as listener:
        ends: list[Connection[Any, Any]] = []
        accepting = threading.Thread(target=lambda: ends.append(listener.accept()))
        accepting.start()
        address: tuple[str, int] = listener.address  # type: ignore[assignment]
        engine = EngineConnection(address, b"key", rank=0)
        accepting.join()
        (end,) = ends
        payloads = [bytes([number]) * LARGE for number in range(3)]

        def send() -> None:
            for payload in payloads:
                end.send(payload)
            end.close()

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        sending.join(60)
        assert not sending.is_alive(), "the worker reads only when it asks"
        assert [engine.receive() for _ in payloads] == payloads
        for _ in range(2):
            with pytest.raises(EOFError):
                engine.receive()
        engine.close()
