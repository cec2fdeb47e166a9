"""When each unit of a pass is read, brought to the device and used: the steady state of a plan,
played through unit by unit."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from partition.pass_work import PassWork, StageWork, UnitWork

LANES = ("disk", "host link", "compute", "collectives")
"""What works at the same time on a stage."""

WARM_UP_ROUNDS = 2
"""How often all passes in flight run before the one that is shown: the ring is then in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One lane at work on one unit. Seconds from the start of the pass shown; those of reads ahead
    of it are negative. ``ahead``: for a pass other than the one shown."""

    stage: int
    lane: str
    unit: str
    start_s: float
    end_s: float
    ahead: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The events of the pass shown and those of others in the same ``pass_s`` seconds, from its
    start on the first stage to its end on the last. ``ranks`` are the stages' slowest ranks."""

    pass_s: float
    ranks: tuple[int, ...]
    events: tuple[Event, ...]


def timeline(work: PassWork) -> Timeline:
    """Play passes through the stages, at most ``work.passes_in_flight`` at once, until they are
    steady; the next one is shown.

    A lane does one thing at a time, in the order of the pass. A unit that does not stay is read as
    soon as the ring has room, which is when the units before it have been used; it is brought to
    the device when it has been read, and used when it is there and the device is free. KV that
    rotates comes with its unit; where that stays, from the start of the pass on.
    """
    stages = [_Stage(work=stage) for stage in work.stages]
    shown = WARM_UP_ROUNDS * work.passes_in_flight
    returned: list[float] = []
    started: list[float] = []
    for index in range(shown + work.passes_in_flight + 1):
        waits_for = index - work.passes_in_flight
        ready = returned[waits_for] if waits_for >= 0 else 0.0
        for stage in stages:
            start, ready = stage.run(index, ready)
            if stage is stages[0]:
                started.append(start)
        returned.append(ready)
    start, end = started[shown], returned[shown]
    events = (
        Event(
            stage=stage.work.stage,
            lane=lane,
            unit=unit,
            start_s=max(first, start) - start,
            end_s=min(last, end) - start,
            ahead=index != shown,
        )
        for stage in stages
        for index, lane, unit, first, last in stage.events
        if first < end and last > start
    )
    return Timeline(
        pass_s=end - start,
        ranks=tuple(stage.rank for stage in work.stages),
        events=tuple(events),
    )


@dataclass(slots=True, kw_only=True)
class _Stage:
    work: StageWork
    events: list[tuple[int, str, str, float, float]] = field(default_factory=list)
    free_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LANES, 0.0))
    ring: deque[tuple[int, float]] = field(default_factory=deque)
    ring_used: int = 0

    def run(self, index: int, ready_s: float) -> tuple[float, float]:
        """One pass whose hidden states are there at ``ready_s``; when it starts and has been
        sent on."""
        start = max(ready_s, self.free_s["compute"])
        now = self._occupy(index, "compute", "pass", start, self.work.overhead_s)
        for unit in self.work.units:
            there = self._fetch(index, unit, start)
            now = self._occupy(index, "compute", unit.unit, max(now, there), unit.compute_s)
            now = self._occupy(index, "collectives", unit.unit, now, unit.collectives_s)
            if unit.ring_bytes:
                self.ring.append((unit.ring_bytes, now))
        now = self._occupy(index, "collectives", "to the next stage", now, self.work.send_s)
        self.free_s["compute"] = now
        return start, now

    def _fetch(self, index: int, unit: UnitWork, start_s: float) -> float:
        """Bring what of the unit does not stay, in a pass that begins at ``start_s``; when it is
        there."""
        if not unit.disk_s and not unit.host_link_s:
            return 0.0
        room = 0.0 if unit.ring_bytes else start_s
        self.ring_used += unit.ring_bytes
        while self.ring and self.ring_used > self.work.ring_bytes:
            num_bytes, room = self.ring.popleft()
            self.ring_used -= num_bytes
        read = self._occupy(index, "disk", unit.unit, max(room, self.free_s["disk"]), unit.disk_s)
        start = max(room, read if unit.disk_s else 0.0, self.free_s["host link"])
        return self._occupy(index, "host link", unit.unit, start, unit.host_link_s)

    def _occupy(self, index: int, lane: str, unit: str, start: float, seconds: float) -> float:
        if not seconds:
            return start
        self.events.append((index, lane, unit, start, start + seconds))
        self.free_s[lane] = start + seconds
        return start + seconds
