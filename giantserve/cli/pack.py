"""``giantserve pack``: the weights that a plan keeps on NVMe, written ahead of serving."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from giantserve.cli.engine_options import Model, with_engine_options
from giantserve.options import engine_config


@with_engine_options
def pack(model: Model, engine: dict[str, Any]) -> None:
    """Write the shard store of a model ahead of `serve`, which then need not.

    Give the same sizes of memory to both: left out, they follow from what is free, and another plan
    needs another store. What is written already stays; a pack that was cut short goes on where it
    was.
    """
    config = engine_config({"model": model, **engine})

    from giantserve.planning import resolve
    from giantserve.shard_weights import ShardWeights, plan_profile
    from kvcache.tier import Tier

    resolution = resolve(config)
    plan = resolution.plan
    typer.echo(f"plan: {plan.reason}", err=True)
    model_config, profile = plan_profile(plan, config.trust_remote_code)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bars = Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True))
    with bars:
        for shard in plan.shards:
            weights = ShardWeights(
                plan,
                shard.rank,
                model_config,
                profile,
                plan.tensor_parallel,
                resolution.config.nvme_dir,
            )
            task = bars.add_task(f"shard {shard.rank}", total=shard.weight_bytes(Tier.NVME))
            path = weights.pack(lambda num_bytes, task=task: bars.advance(task, num_bytes))  # type: ignore[misc]
            if path is None:
                typer.echo(f"shard {shard.rank}: the plan keeps no weights on NVMe")
            else:
                typer.echo(f"shard {shard.rank}: {path}")
