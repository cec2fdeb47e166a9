"""A plan and its forecast as tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from giantserve.cli.plan_report import PlanReport, layout
from kvcache.tier import Tier
from partition.byte_size import format_bytes
from partition.explain import TierRow, tier_rows
from partition.plan import PartitionPlan

TIER_NAMES = {Tier.DEVICE: "device", Tier.HOST: "host", Tier.NVME: "NVMe"}


def print_report(report: PlanReport, console: Console | None = None) -> None:
    """Where everything lies, what it will cost, and what was not chosen."""
    console = console or Console()
    console.print(plan_table(report.plan))
    console.print(forecast_table(report))
    if report.plan.reason:
        console.print(f"forecast: {report.plan.reason}", markup=False, highlight=False)
    if report.runners_up:
        console.print(runners_up_table(report))
    for change in report.changes:
        console.print(f"would change it: {change}", markup=False, highlight=False)


def plan_table(plan: PartitionPlan) -> Table:
    """A row a stage and tier, all shards of the stage together."""
    table = _table(
        f"{plan.architecture} in {plan.dtype}: {layout(plan)}, {plan.max_num_seqs} sequences of "
        f"up to {plan.max_model_len} tokens{_slices(plan)}",
        "stage",
        "layers",
        "tier",
        "weights",
        "KV",
        "buffers",
        "budget",
        "used",
    )
    rows = tier_rows(plan)
    for stage in plan.stages:
        for tier in Tier:
            held = [row for row in rows if row.stage == stage.index and row.tier is tier]
            first = tier is Tier.DEVICE
            table.add_row(
                str(stage.index) if first else "",
                f"{stage.first_layer}-{stage.end_layer - 1}" if first else "",
                TIER_NAMES[tier],
                *_sizes(held),
                end_section=tier is Tier.NVME,
            )
    return table


def _slices(plan: PartitionPlan) -> str:
    if not plan.is_sliced:
        return ""
    return f", passes of {plan.max_num_batched_tokens} in slices of {plan.max_slice_tokens}"


def forecast_table(report: PlanReport) -> Table:
    """What the plan will do; then what a decode pass takes on the slowest stage and moves in
    all."""
    forecast = report.plan.forecast
    table = _table("Forecast", "", "")
    table.add_row("throughput", f"{forecast.tokens_per_s:.4g} tokens/s")
    table.add_row("time to first token (TTFT)", seconds(forecast.time_to_first_token_s))
    table.add_row("time per output token (TPOT)", seconds(forecast.time_per_output_token_s))
    table.add_row("binds", forecast.binds, end_section=True)
    for name, time in sorted(forecast.terms_s.items(), key=lambda item: -item[1]):
        if time:
            table.add_row(f"a pass, slowest stage: {name}", seconds(time))
    table.add_section()
    for link, num_bytes in report.work.moved_bytes.items():
        if num_bytes:
            table.add_row(f"a pass moves: {link}", format_bytes(num_bytes))
    return table


def runners_up_table(report: PlanReport) -> Table:
    """The next best, and why they lost."""
    table = _table("Runners-up", "", "tokens/s", "TPOT", "TTFT", "why it lost")
    for other in report.runners_up:
        forecast = other.plan.forecast
        table.add_row(
            layout(other.plan),
            f"{forecast.tokens_per_s:.4g}",
            seconds(forecast.time_per_output_token_s),
            seconds(forecast.time_to_first_token_s),
            other.why,
        )
    return table


def seconds(time: float) -> str:
    """A duration with three digits."""
    return f"{time:.3g} s" if time >= 1 else f"{1e3 * time:.3g} ms"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    words = ("", "stage", "tier", "why it lost")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right")
    return table


def _sizes(rows: list[TierRow]) -> list[str]:
    budget = sum(row.budget_bytes for row in rows)
    used = sum(row.used_bytes for row in rows)
    sizes = [
        sum(row.weight_bytes for row in rows),
        sum(row.kv_bytes for row in rows),
        sum(row.other_bytes for row in rows),
        budget,
    ]
    share = f"{100 * used / budget:.0f} %" if budget else "-"
    return [*(format_bytes(size) if size else "-" for size in sizes), share]
