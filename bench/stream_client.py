"""A streaming HTTP client that costs next to nothing, so that what is measured is the server."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Timeline:
    """One request: when it was sent, when each token came, and the bytes received."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


async def stream_completion(port: int, body: dict[str, Any]) -> Timeline:
    """POST /v1/completions with ``stream`` and read to the end; an error raises RuntimeError."""
    payload = json.dumps({**body, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    timeline = Timeline(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + payload)
    rest = b""
    while data := await reader.read(65536):
        now_s = time.perf_counter()
        timeline.num_bytes += len(data)
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if line.startswith(b'data: {"error"') or line.startswith(b"HTTP/1.1 4"):
                raise RuntimeError(line.decode())
            if line.startswith(b"data: {"):
                timeline.token_s.append(now_s)
    writer.close()
    return timeline
