"""A plan as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from giantserve.units import format_bytes
from kvcache.tier import Tier
from partition.plan import PartitionPlan, ShardPlan


def print_plan(plan: PartitionPlan, console: Console | None = None) -> None:
    """The plan by shard, then the forecast and what binds it."""
    console = console or Console()
    console.print(plan_table(plan))
    forecast = plan.forecast
    console.print(
        f"forecast: {forecast.tokens_per_s:.1f} tokens/s, first token after "
        f"{forecast.time_to_first_token_s:.2f} s, decode pass "
        f"{1e3 * forecast.decode_pass_s:.0f} ms, bound by {forecast.binds}"
    )
    if plan.reason:
        console.print(plan.reason, markup=False)


def plan_table(plan: PartitionPlan) -> Table:
    """One row a shard."""
    table = Table(
        title=f"{plan.architecture} in {plan.dtype}: TP {plan.tensor_parallel} x "
        f"PP {plan.pipeline_parallel}{', experts dealt whole' if plan.expert_parallel else ''}, "
        f"{plan.max_num_seqs} sequences of up to "
        f"{plan.max_model_len} tokens"
    )
    for heading in ("shard", "layers", "device", "host", "NVMe", "KV device", "KV host"):
        table.add_column(heading, justify="left" if heading == "shard" else "right")
    for stage in plan.stages:
        for shard in stage.shards:
            layers = f"{stage.first_layer}-{stage.end_layer - 1}"
            table.add_row(f"stage {stage.index}.{shard.tp_rank}", layers, *_sizes(shard))
    return table


def _sizes(shard: ShardPlan) -> list[str]:
    weights = [shard.weight_bytes(tier) for tier in (Tier.DEVICE, Tier.HOST, Tier.NVME)]
    sizes = [*weights, shard.device_kv_bytes, shard.host_kv_bytes]
    return [format_bytes(size) if size else "-" for size in sizes]
