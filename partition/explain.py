"""A plan as rows for a table. Pure data: whoever prints it chooses how."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.tier import Tier
from partition.plan import PartitionPlan, ShardPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRow:
    """What one shard holds on one tier, in bytes. ``other_bytes`` are ring and workspace."""

    stage: int
    tp_rank: int
    rank: int
    first_layer: int
    end_layer: int
    tier: Tier
    num_units: int
    weight_bytes: int
    kv_bytes: int
    other_bytes: int
    budget_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.other_bytes


def tier_rows(plan: PartitionPlan) -> tuple[TierRow, ...]:
    """A row per shard and tier, by rank, fastest tier first."""
    return tuple(
        TierRow(
            stage=stage.index,
            tp_rank=shard.tp_rank,
            rank=shard.rank,
            first_layer=stage.first_layer,
            end_layer=stage.end_layer,
            tier=tier,
            num_units=sum(placement.tier is tier for placement in shard.placements),
            weight_bytes=shard.weight_bytes(tier),
            kv_bytes=_kv_bytes(shard, tier),
            other_bytes=shard.used_bytes(tier) - shard.weight_bytes(tier) - _kv_bytes(shard, tier),
            budget_bytes=shard.budget.of(tier),
        )
        for stage in plan.stages
        for shard in stage.shards
        for tier in Tier
    )


def forecast_rows(plan: PartitionPlan) -> tuple[tuple[str, float, str], ...]:
    """(name, value, unit) of the forecast, then the terms of the slowest stage's decode pass."""
    forecast = plan.forecast
    return (
        ("throughput", forecast.tokens_per_s, "tokens/s"),
        ("decode pass", forecast.decode_pass_s, "s"),
        ("prefill pass", forecast.prefill_pass_s, "s"),
        ("time to first token", forecast.time_to_first_token_s, "s"),
        *((name, seconds, "s") for name, seconds in forecast.terms_s.items()),
    )


def _kv_bytes(shard: ShardPlan, tier: Tier) -> int:
    return {
        Tier.DEVICE: shard.device_kv_bytes,
        Tier.HOST: shard.host_kv_bytes,
        Tier.NVME: shard.nvme_kv_bytes,
    }[tier]
