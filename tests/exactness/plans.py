"""Plans bent to a purpose: every unit on one tier, few KV blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from giantserve.config import EngineConfig
from giantserve.planning import resolve
from kvcache.tier import Tier, TierBudget
from partition.plan import PartitionPlan, ShardPlan, UnitPlacement

BIG = 1 << 30
BLOCK_SIZE = 4


def make_plan(
    path: Path,
    tensor_parallel: int,
    pipeline_parallel: int,
    tiers: str,
    *,
    device_blocks: int,
    host_blocks: int,
    max_model_len: int = 128,
    expert_parallel: bool = False,
) -> PartitionPlan:
    """The planner's split of the model, with its units on the tiers that ``tiers`` names ("mixed":
    in turn) and the KV blocks given."""
    config = EngineConfig(
        model=str(path),
        device_memory=BIG,
        host_memory=BIG,
        nvme_memory=BIG,
        nvme_dir=path / "nvme",
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=8,
        max_num_batched_tokens=48,
    )
    plan = resolve(config).plan
    stages = tuple(
        replace(stage, shards=tuple(_place(shard, tiers) for shard in stage.shards))
        for stage in plan.stages
    )
    streams = tiers != Tier.DEVICE.value
    return replace(
        plan,
        stages=stages,
        passes_in_flight=1 if streams else pipeline_parallel,
        num_device_blocks=device_blocks,
        num_host_blocks=host_blocks,
        # by the rates of the moment the planner may let KV rotate, and nothing would be preempted
        num_rotating_host_blocks=0,
        num_rotating_nvme_blocks=0,
        num_rotation_slots=0,
        num_tail_blocks=0,
        attends_on_host=False,
    )


def _place(shard: ShardPlan, tiers: str) -> ShardPlan:
    cycle = list(Tier) if tiers == "mixed" else [Tier(tiers)]
    placements: list[UnitPlacement] = []
    for index, placement in enumerate(shard.placements):
        pinned = placement.unit.endswith(".small") or placement.unit in ("input", "output")
        tier = Tier.DEVICE if pinned else cycle[index % len(cycle)]
        placements.append(replace(placement, tier=tier))
    streamed = [p.num_bytes for p in placements if p.tier is not Tier.DEVICE]
    budget = TierBudget(device_bytes=2 * BIG, host_bytes=2 * BIG, nvme_bytes=BIG)
    return replace(
        shard,
        budget=budget,
        placements=tuple(placements),
        ring_bytes=2 * max(streamed, default=0),
    )
