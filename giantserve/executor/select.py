"""Make the executor that a config asks for."""

from __future__ import annotations

import os

from giantserve.config import EngineConfig
from giantserve.errors import ConfigError
from giantserve.executor.base import Executor, ProgressCallback
from giantserve.executor.launcher import Launcher
from giantserve.shard_spec import ShardSpec
from partition.plan import PartitionPlan


def make_executor(
    config: EngineConfig,
    plan: PartitionPlan,
    on_progress: ProgressCallback,
    launcher: Launcher | None = None,
) -> Executor:
    """Start the workers of ``plan``; returns when all take passes, which may be before they are
    loaded."""
    specs = shard_specs(config, plan)
    if config.executor == "local":
        from giantserve.executor.local import LocalExecutor

        return LocalExecutor(specs, on_progress, launcher)
    if config.executor == "ray":
        from giantserve.executor.ray import RayExecutor

        return RayExecutor(specs, on_progress)
    raise ConfigError(f'executor "{config.executor}" is unknown; use "local" or "ray"')


def shard_specs(config: EngineConfig, plan: PartitionPlan) -> list[ShardSpec]:
    """One spec a rank: devices dealt in order, CPU cores shared evenly."""
    count = len(plan.shards)
    on_cuda = config.device == "cuda" or (config.device == "auto" and _has_cuda())
    cores = len(os.sched_getaffinity(0))
    return [
        ShardSpec(
            plan=plan,
            rank=rank,
            nvme_dir=config.nvme_dir,
            device=f"cuda:{rank}" if on_cuda else "cpu",
            num_threads=config.threads_per_shard or max(1, cores // count),
            trust_remote_code=config.trust_remote_code,
            trace=config.trace is not None,
            keeps_prefixes=config.prefix_memory is not None,
            storage_backend=config.storage_backend,
            exact_attention=config.exact_attention,
        )
        for rank in range(count)
    ]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
