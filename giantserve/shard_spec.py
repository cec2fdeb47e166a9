"""What a worker needs to become one rank of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from partition.plan import PartitionPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """Rank ``rank`` of ``plan``. ``nvme_dir`` holds the shard store; ``device`` is a torch
    device. ``trace``: it keeps spans of what it does. ``keeps_prefixes``: cached KV on NVMe
    outlives it. ``exact_attention``: as in `EngineConfig`."""

    plan: PartitionPlan
    rank: int
    nvme_dir: Path | None
    device: str
    num_threads: int
    trust_remote_code: bool = False
    trace: bool = False
    keeps_prefixes: bool = False
    storage_backend: str = "posix"
    exact_attention: bool = False
