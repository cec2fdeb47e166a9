"""Whether each memory tier that was asked for is really used: an offload that silently does nothing
is worse than none."""

from __future__ import annotations

from collections.abc import Mapping

from giantserve.config import EngineConfig
from giantserve.errors import ConfigError, EngineDeadError
from kvcache.tier import Tier
from partition.plan import PartitionPlan

OPTIONS = {Tier.HOST: ("host_memory",), Tier.NVME: ("nvme_dir", "nvme_memory")}
"""Those that ask for a tier."""


def used_tiers(plan: PartitionPlan) -> set[Tier]:
    """Those on which the plan puts something."""
    used = {placement.tier for shard in plan.shards for placement in shard.placements}
    on_host = (plan.num_host_blocks, plan.num_rotating_host_blocks)
    if any(on_host) or any(shard.host_activation_bytes for shard in plan.shards):
        used.add(Tier.HOST)
    if plan.num_rotating_nvme_blocks or any(s.nvme_activation_bytes for s in plan.shards):
        used.add(Tier.NVME)
    return used


def check_asked(config: EngineConfig, plan: PartitionPlan) -> None:
    """Raise ConfigError for a tier that ``config``, as the user gave it, asks for, and on which
    ``plan``, the planner's own, puts nothing, unless ``allow_unused_tiers`` is set."""
    if config.allow_unused_tiers:
        return
    used = used_tiers(plan)
    for tier, names in OPTIONS.items():
        asked = [name for name in names if getattr(config, name)]
        if asked and tier not in used:
            given = " and ".join(f"{name} {getattr(config, name)}" for name in asked)
            raise ConfigError(
                f"{given} was asked for, but nothing would lie on the {tier.value} tier: "
                f"everything fits above it; leave {' and '.join(asked)} out, lower device_memory "
                "so that it is needed, or set allow_unused_tiers"
            )


def check_held(plan: PartitionPlan, held_bytes: Mapping[Tier, int]) -> None:
    """Raise EngineDeadError for a tier on which the plan puts something, but the shards of an
    engine hold nothing."""
    for tier in used_tiers(plan):
        if not held_bytes[tier]:
            raise EngineDeadError(
                f"the plan uses the {tier.value} tier, but the shards hold nothing there"
            )
