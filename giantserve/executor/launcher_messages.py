"""What is asked of a launcher process; each request has one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Fork a worker in ``environment``; its process id is the answer."""

    address: tuple[str, int]
    authkey: bytes
    rank: int
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Poll:
    """How a worker ended, or None."""

    pid: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End a worker at once; None is the answer."""

    pid: int


@dataclass(frozen=True, slots=True)
class Run:
    """Call a function in a fork: ``payload`` pickles it, its arguments and its keywords. `Called`
    is the answer."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Called:
    """What the function returned, pickled, or what it raised."""

    payload: bytes = b""
    error: Exception | None = None
