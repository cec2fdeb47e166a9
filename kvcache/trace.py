"""What a shard did when: spans for a timeline that can be looked at."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

NUM_SPANS = 100_000


@dataclass(frozen=True, slots=True)
class Span:
    """``lane`` did ``what`` from ``start_s`` to ``end_s`` (by the clock of `time.perf_counter`)."""

    lane: str
    what: str
    start_s: float
    end_s: float
    num_bytes: int = 0


class Trace:
    """Keeps the last `NUM_SPANS` spans. Thread-safe."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=NUM_SPANS)

    def add(self, lane: str, what: str, start_s: float, num_bytes: int = 0) -> None:
        """Something that began at ``start_s`` is over now."""
        self._spans.append(Span(lane, what, start_s, time.perf_counter(), num_bytes))

    def snapshot(self) -> list[dict[str, Any]]:
        """The spans as plain data, in seconds since the epoch: machines' clocks begin anywhere."""
        epoch = time.time() - time.perf_counter()
        return [
            {**asdict(span), "start_s": span.start_s + epoch, "end_s": span.end_s + epoch}
            for span in tuple(self._spans)
        ]
