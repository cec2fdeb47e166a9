"""Counters of an engine, and how they are told to a user."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from giantserve.scheduler import Scheduler
from kvcache.block_pool import BlockPool


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine started."""

    started_s: float = field(default_factory=time.monotonic)
    requests: int = 0
    aborted: int = 0
    tokens: int = 0
    passes: int = 0

    def snapshot(
        self, scheduler: Scheduler, pool: BlockPool, shards: dict[int, dict[str, Any]]
    ) -> dict[str, Any]:
        """Plain data: queues, KV blocks, tokens, and per shard the bytes by tier and direction.

        ``roofline_fraction`` is that of the slowest shard: the share of its busy time during which the
        link that limits it was moving bytes.
        """
        return {
            "uptime_s": time.monotonic() - self.started_s,
            "requests": self.requests,
            "aborted_requests": self.aborted,
            "generated_tokens": self.tokens,
            "passes": self.passes,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "kv": {
                "device_blocks": pool.num_device_blocks,
                "device_blocks_free": pool.num_free_device_blocks,
                "host_blocks": pool.num_host_blocks,
                "host_blocks_free": pool.num_free_host_blocks,
            },
            "roofline_fraction": min(shard["roofline_fraction"] for shard in shards.values()),
            "shards": [shards[rank] for rank in sorted(shards)],
        }
