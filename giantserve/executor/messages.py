"""What the engine and a worker say to each other over their connection, beside the passes
themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from giantserve.shard_spec import ShardSpec
from kvcache.block_copy import BlockCopy
from kvcache.block_pool import CachedBlock
from kvcache.tier import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker's first word."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Rank 0's answer to its spec: where the ranks meet for collectives."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Become this shard. ``rendezvous`` is None for rank 0, which makes it, and for a world of
    one."""

    spec: ShardSpec
    host: str
    rendezvous: Rendezvous | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a worker is with loading."""

    what: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker takes passes; weights that are not there yet are waited for. ``kept`` is the
    content of the KV blocks that an earlier process left, oldest use first."""

    kept: dict[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """All the worker's weights are on their tiers; ``used_bytes`` is what it holds there."""

    used_bytes: dict[Tier, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """The worker has got on with what it was asked for since it last said something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassDone:
    """A worker whose blocks can be lost has run a pass, and lost these."""

    step_id: int
    lost: tuple[CachedBlock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsRequest:
    """Asks a worker for its counters, in order with the passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A worker's counters, as plain data."""

    rank: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Run these copies, and leave the content of these KV blocks, oldest use first, to a later
    process; a worker answers with `Kept`."""

    copies: tuple[BlockCopy, ...]
    hashes: dict[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The worker has done what `Keep` asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Close the shard and exit; one that keeps a trace sends its `Spans` first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """What a worker did when, as plain data."""

    spans: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The worker failed and exits. ``error`` is picklable; ``trace`` is its traceback as text."""

    rank: int
    error: Exception
    trace: str
