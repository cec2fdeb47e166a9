"""Counters of an engine, and how they are told to a user."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from giantserve.scheduler import Scheduler
from kvcache.block_pool import BlockPool
from partition.bandwidths import Bandwidths


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine started. ``bandwidths`` are what one shard's links were measured to
    reach."""

    bandwidths: Bandwidths
    started_s: float = field(default_factory=time.monotonic)
    requests: int = 0
    aborted: int = 0
    tokens: int = 0
    passes: int = 0

    def snapshot(
        self, scheduler: Scheduler, pool: BlockPool, shards: dict[int, dict[str, Any]]
    ) -> dict[str, Any]:
        """Plain data: queues, KV blocks, tokens, and per shard the bytes by tier and direction.

        ``roofline_fraction`` compares the time that the bytes moved must have taken at the measured
        bandwidths, on the link that limits, with the time that the passes took; of the busiest
        shard. ``shards`` is empty while none has told its counters.
        """
        busiest = max(shards.values(), key=lambda shard: shard["busy_s"], default=None)
        return {
            "uptime_s": time.monotonic() - self.started_s,
            "requests": self.requests,
            "aborted_requests": self.aborted,
            "generated_tokens": self.tokens,
            "passes": self.passes,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "kv": {
                "losses": scheduler.num_losses,
                "preemptions": scheduler.num_preemptions,
                "prompt_tokens": scheduler.num_prompt_tokens,
                "prompt_tokens_cached": scheduler.num_cached_tokens,
                "device_blocks": pool.num_device_blocks,
                "device_blocks_free": pool.num_free_device_blocks,
                "rotating_blocks": pool.num_active_blocks - pool.num_device_blocks,
                "rotating_blocks_free": pool.num_free_active_blocks - pool.num_free_device_blocks,
                "device_blocks_cached": pool.num_cached_device_blocks,
                "rotating_blocks_cached": pool.num_cached_rotating_blocks,
                "rotating_blocks_suspect": pool.num_suspect_blocks,
                "host_blocks_cached": pool.num_cached_host_blocks,
                "host_blocks": pool.num_host_blocks,
                "host_blocks_free": pool.num_free_host_blocks,
            },
            "roofline_fraction": self._roofline_fraction(busiest) if busiest else 0.0,
            "shards": [shards[rank] for rank in sorted(shards)],
        }

    def _roofline_fraction(self, shard: dict[str, Any]) -> float:
        rates = {
            "nvme": self.bandwidths.disk_read,
            "host": self.bandwidths.host_to_device,
        }
        least = [shard["passes"] * shard["resident_bytes"] / self.bandwidths.device_memory]
        for source, rate in rates.items():
            moved = sum(link["bytes"] for link in shard["links"] if link["source"] == source)
            least.append(moved / rate)
        return max(least) / shard["busy_s"] if shard["busy_s"] else 0.0
