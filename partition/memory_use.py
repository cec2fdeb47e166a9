"""What fills each tier of each shard, by kind: weights, KV, the ring, the workspace, and what is
free."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.tier import Tier
from partition.plan import PartitionPlan, ShardPlan
from partition.profile import ModelProfile, UnitKind

KINDS = (
    *(kind.value for kind in UnitKind),
    "KV",
    "ring",
    "rotation",
    "workspace",
    "staging",
    "activations",
    "free",
)
"""The parts a budget is dealt into, in the order in which they are shown. The first are kinds of
weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """One tier of one shard. ``parts`` are bytes by `KINDS`, without those of no bytes; they add up
    to ``budget_bytes``."""

    rank: int
    tier: Tier
    budget_bytes: int
    parts: dict[str, int]

    @property
    def used_share(self) -> float:
        """The part of the budget that is spoken for, 0 to 1."""
        if not self.budget_bytes:
            return 0.0
        return 1 - self.parts.get("free", 0) / self.budget_bytes


def memory_use(plan: PartitionPlan, profile: ModelProfile) -> tuple[MemoryUse, ...]:
    """A row per shard and tier, by rank, fastest tier first. ``profile`` is the plan's model."""
    kinds = {unit.name: unit.kind.value for unit in profile.units}
    return tuple(_use(shard, tier, kinds) for shard in plan.shards for tier in Tier)


def totals(uses: tuple[MemoryUse, ...]) -> dict[tuple[str, Tier], int]:
    """Bytes of all shards by kind and tier."""
    return {
        (kind, tier): sum(use.parts.get(kind, 0) for use in uses if use.tier is tier)
        for kind in KINDS
        for tier in Tier
    }


def _use(shard: ShardPlan, tier: Tier, kinds: dict[str, str]) -> MemoryUse:
    found = dict.fromkeys(KINDS, 0)
    for placement in shard.placements:
        if placement.tier is tier:
            found[kinds[placement.unit]] += placement.num_bytes
    if tier is Tier.DEVICE:
        found["KV"] = shard.device_kv_bytes
        found["ring"] = shard.ring_bytes
        found["rotation"] = shard.rotation_bytes
        found["workspace"] = shard.workspace_bytes
    if tier is Tier.HOST:
        found["KV"] = shard.host_kv_bytes
        found["staging"] = shard.staging_bytes
        found["activations"] = shard.host_activation_bytes
    if tier is Tier.NVME:
        found["KV"] = shard.nvme_kv_bytes
        found["activations"] = shard.nvme_activation_bytes
    budget = shard.budget.of(tier)
    found["free"] = budget - shard.used_bytes(tier)
    parts = {kind: num_bytes for kind, num_bytes in found.items() if num_bytes}
    return MemoryUse(rank=shard.rank, tier=tier, budget_bytes=budget, parts=parts)
