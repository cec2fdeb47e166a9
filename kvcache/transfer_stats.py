"""Counts the bytes that move between tiers and the time that this takes."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from kvcache.tier import Tier
from kvcache.trace import Trace


@dataclass(frozen=True, slots=True)
class Link:
    """What moves ("weights", "rows", ...), from which tier, to which."""

    kind: str
    source: Tier
    target: Tier

    def __str__(self) -> str:
        return f"{self.kind}: {self.source.value} to {self.target.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTotals:
    """``busy_s`` is the time during which at least one transfer was under way on the link,
    ``queue_depth`` how many there were in the mean of that time."""

    num_transfers: int
    num_bytes: int
    busy_s: float
    queue_depth: float


@dataclass(slots=True)
class _Counter:
    num_transfers: int = 0
    num_bytes: int = 0
    busy_s: float = 0.0
    in_flight: int = 0
    since: float = 0.0
    depth_s: float = 0.0

    def advance(self, now: float) -> None:
        """Count the time since the last transfer began or ended."""
        self.busy_s += (now - self.since) * (self.in_flight > 0)
        self.depth_s += (now - self.since) * self.in_flight
        self.since = now


class TransferStats:
    """Counters by link, and the seconds that readers waited for data. Thread-safe. ``trace`` gets
    every transfer and every wait."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self._lock = threading.Lock()
        self._counters: dict[Link, _Counter] = {}
        self._stall_s = 0.0

    def begin(self, link: Link) -> float:
        """A transfer starts: now, for `end`, with which every one ends."""
        with self._lock:
            now = time.perf_counter()
            counter = self._counters.setdefault(link, _Counter())
            counter.advance(now)
            counter.in_flight += 1
            return now

    def end(self, link: Link, num_bytes: int, begun_s: float, what: str = "") -> None:
        """The transfer of ``what`` that began at ``begun_s`` is over, with ``num_bytes``; 0 where
        it failed."""
        with self._lock:
            counter = self._counters[link]
            counter.advance(time.perf_counter())
            counter.in_flight -= 1
            counter.num_transfers += 1
            counter.num_bytes += num_bytes
        if self.trace is not None:
            self.trace.add(str(link), what, begun_s, num_bytes)

    def add_stall(self, begun_s: float, what: str) -> None:
        """A reader has waited for ``what`` since ``begun_s``."""
        with self._lock:
            self._stall_s += time.perf_counter() - begun_s
        if self.trace is not None:
            self.trace.add("waits", what, begun_s)

    @property
    def stall_s(self) -> float:
        return self._stall_s

    def snapshot(self) -> dict[Link, LinkTotals]:
        """The totals so far, transfers under way included in the time and not in the bytes."""
        with self._lock:
            for counter in self._counters.values():
                counter.advance(time.perf_counter())
            return {
                link: LinkTotals(
                    num_transfers=counter.num_transfers,
                    num_bytes=counter.num_bytes,
                    busy_s=counter.busy_s,
                    queue_depth=counter.depth_s / counter.busy_s if counter.busy_s else 0.0,
                )
                for link, counter in self._counters.items()
            }
