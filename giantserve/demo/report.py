"""What the demonstration prints: the plan and the measurements, as tables."""

from __future__ import annotations

from rich.table import Table

from giantserve.demo.conversation import Measured
from kvcache.tier import Tier
from partition.byte_size import format_bytes
from partition.explain import tier_rows
from partition.plan import PartitionPlan

TIER_NAMES = {Tier.DEVICE: "device", Tier.HOST: "host", Tier.NVME: "disk"}


def plan_table(plan: PartitionPlan) -> Table:
    """A row a shard and tier: what lies there, and what may."""
    table = Table(title="The plan", title_justify="left")
    for heading in ("shard", "layers", "tier", "weights", "KV", "buffers", "budget"):
        table.add_column(heading, justify="left" if heading in ("shard", "tier") else "right")
    for row in tier_rows(plan):
        first = row.tier is Tier.DEVICE
        table.add_row(
            f"stage {row.stage}" if first else "",
            f"{row.first_layer}-{row.end_layer - 1}" if first else "",
            TIER_NAMES[row.tier],
            _size(row.weight_bytes),
            _size(row.kv_bytes),
            _size(row.other_bytes),
            _size(row.budget_bytes),
            end_section=row.tier is Tier.NVME,
        )
    return table


def shares(plan: PartitionPlan) -> str:
    """One line: how the weights are dealt over the tiers."""
    by_tier = {tier: sum(shard.weight_bytes(tier) for shard in plan.shards) for tier in Tier}
    total = sum(by_tier.values())
    parts = [f"{100 * by_tier[tier] / total:.0f} % {TIER_NAMES[tier]}" for tier in Tier]
    return f"{format_bytes(total)} of weights: {', '.join(parts)}"


def measured_table(plan: PartitionPlan, chat: Measured, batch: Measured, ceiling: float) -> Table:
    """The chat and the batch side by side; ``ceiling`` is the disk's rate in the same minute."""
    table = Table(title="Measured", title_justify="left")
    table.add_column("")
    table.add_column("chat", justify="right")
    table.add_column(f"batch of {plan.max_num_seqs}", justify="right")
    both = chat, batch
    table.add_row("tokens", *(str(part.num_tokens) for part in both))
    table.add_row("tokens/s", *(f"{part.tokens_per_s:.1f}" for part in both))
    first = chat.first_token_s
    table.add_row("first token after", "-" if first is None else f"{first:.2f} s", "")
    links = sorted({link for part in both for link in part.moved_bytes}, reverse=True)
    for source, target in links:
        sizes = [format_bytes(part.moved_bytes.get((source, target), 0)) for part in both]
        table.add_row(f"moved {_name(source)} to {_name(target)}", *sizes)
    table.add_row("read from disk, GB/s", *(f"{part.disk_read / 1e9:.2f}" for part in both))
    fractions = [f"{100 * part.disk_read / ceiling:.0f} %" for part in both]
    table.add_row(f"of the disk's {ceiling / 1e9:.2f} GB/s this minute", *fractions)
    return table


def _name(tier: str) -> str:
    return TIER_NAMES[Tier(tier)]


def _size(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes else "-"
