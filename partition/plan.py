"""The planner's decision: the only thing the executor reads. Frozen, validated, versioned JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcache.tier import Tier, TierBudget

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlacement:
    """Where one shard keeps one unit. ``num_bytes`` is the shard's own slice."""

    unit: str
    tier: Tier
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One rank: its stage, its place in the tensor-parallel group, and where its units lie.

    ``ring_bytes`` of the device budget are buffers through which non-resident units pass.
    ``device_kv_bytes`` and ``host_kv_bytes`` hold the KV blocks of those tiers.
    ``workspace_bytes`` of the device budget are kept free for activations.
    """

    rank: int
    stage: int
    tp_rank: int
    budget: TierBudget
    placements: tuple[UnitPlacement, ...]
    ring_bytes: int
    device_kv_bytes: int
    host_kv_bytes: int
    workspace_bytes: int

    def weight_bytes(self, tier: Tier) -> int:
        """Bytes of weights this shard keeps on ``tier``."""
        return sum(p.num_bytes for p in self.placements if p.tier is tier)

    def tier_of(self, unit: str) -> Tier:
        return next(p.tier for p in self.placements if p.unit == unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A run of layers [first_layer, end_layer) and the shards that hold it, by tensor-parallel rank."""

    index: int
    first_layer: int
    end_layer: int
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the planner says a pass will cost. Times in seconds, for the planned batch.

    ``terms_s`` maps each bound ("device memory", "host link", "disk", "compute", "collectives") to its time
    in a decode pass of the slowest stage; ``binds`` names the largest.
    """

    decode_pass_s: float
    prefill_pass_s: float
    tokens_per_s: float
    time_to_first_token_s: float
    binds: str
    terms_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """How one replica runs. All shards hold the same number of KV blocks on each tier."""

    model: str
    architecture: str
    dtype: str
    tensor_parallel: int
    pipeline_parallel: int
    stages: tuple[StagePlan, ...]
    block_size: int
    num_device_blocks: int
    num_host_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    forecast: Forecast
    reason: str = ""
    version: int = PLAN_VERSION

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """All shards, by rank: stage-major, tensor-parallel rank within the stage."""
        return tuple(shard for stage in self.stages for shard in stage.shards)
