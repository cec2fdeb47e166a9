"""What one replica asks of the cluster: bundle 0 for itself, one more for every shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from deployments.options import DeploymentOptions
from giantserve.config import EngineConfig
from partition.plan import PartitionPlan

PRECISION = 1e-4
"""Of a resource, as Ray counts."""


def bundles(
    plan: PartitionPlan, config: EngineConfig, options: DeploymentOptions
) -> list[dict[str, float]]:
    """The bundles of a replica's placement group; the shard of rank r takes bundle r + 1."""
    shard = {"CPU": options.cpus_per_shard, "GPU": gpus_per_shard(config, options)}
    shard = {resource: amount for resource, amount in shard.items() if amount > 0}
    return [{"CPU": options.cpus_per_replica}, *(dict(shard) for _ in plan.shards)]


def missing(bundles: Iterable[Mapping[str, float]], cluster: Mapping[str, float]) -> str:
    """Of which resources the bundles together need more than the cluster has, in words; "" where of
    none. That each finds a node is not looked at."""
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed.update(bundle)
    return " and ".join(
        f"{amount:g} {resource}s where the cluster has {cluster.get(resource, 0.0):g}"
        for resource, amount in needed.items()
        if amount > cluster.get(resource, 0.0) + PRECISION
    )


def gpus_per_shard(config: EngineConfig, options: DeploymentOptions) -> float:
    """As asked; else one where the engine will run on CUDA, none where it will not."""
    if options.gpus_per_shard is not None:
        return options.gpus_per_shard
    if config.device != "auto":
        return 1.0 if config.device.startswith("cuda") else 0.0
    return 1.0 if _has_gpu() else 0.0


def _has_gpu() -> bool:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    finally:
        pynvml.nvmlShutdown()
