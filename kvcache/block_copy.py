"""A move of one KV block's bytes between tiers: the bookkeeping orders it, the shards run it."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.tier import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """Copy one KV block between tiers, on every shard, before the pass computes, in order."""

    source: Tier
    source_id: int
    target: Tier
    target_id: int
