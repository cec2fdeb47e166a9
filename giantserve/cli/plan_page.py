"""A plan as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from giantserve.cli.plan_lanes import lanes
from giantserve.cli.plan_report import PlanReport, layout
from giantserve.cli.plan_table import TIER_NAMES, seconds
from kvcache.tier import Tier
from partition.byte_size import format_bytes
from partition.memory_use import KINDS, MemoryUse, totals


def plan_page(report: PlanReport) -> str:
    """The whole page. Works from a file, in light and dark, without scripts."""
    plan, load = report.plan, report.problem.workload
    subtitle = (
        f"{plan.architecture} in {plan.dtype}: {layout(plan)} on {len(plan.shards)} "
        f"of {report.problem.cluster.num_devices} devices. Planned for {load.concurrency} requests "
        f"at once, {load.prompt_tokens} tokens in and {load.output_tokens} out, "
        f"{report.problem.objective.value.replace('_', ' ')}."
    )
    body = (
        _figures(report),
        _memory(report),
        _pass(report),
        _forecast(report),
        _runners_up(report),
        _changes(report),
    )
    template = files("giantserve.cli").joinpath("plan_page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(f"Plan of {plan.model}"), subtitle=escape(subtitle), body="\n".join(body)
    )


def section(heading: str, note: str, *content: str) -> str:
    """A titled part of the page. ``content`` is HTML, the rest is text."""
    name = heading.lower().replace(" ", "-")
    return "\n".join(
        (
            f'<section aria-labelledby="{name}">',
            f'<h2 id="{name}">{escape(heading)}</h2>',
            f'<p class="quiet">{escape(note)}</p>',
            *content,
            "</section>",
        )
    )


def _figures(report: PlanReport) -> str:
    forecast = report.plan.forecast
    figures = (
        ("throughput", f"{forecast.tokens_per_s:.4g} tokens/s"),
        ("time per output token", seconds(forecast.time_per_output_token_s)),
        ("time to first token", seconds(forecast.time_to_first_token_s)),
        ("binds", forecast.binds),
    )
    tiles = (f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
    return f'<dl class="figures">{"".join(tiles)}</dl>'


def _memory(report: PlanReport) -> str:
    shown = [kind for kind in KINDS if any(kind in use.parts for use in report.uses)]
    keys = (f'<li><i class="{kind}"></i>{kind}</li>' for kind in shown)
    cards = "".join(_card(report, ranks) for ranks in _alike(report))
    return section(
        "Memory",
        "Every device with its three tiers; a bar is a budget. Devices of a stage that hold the "
        "same share one picture.",
        f'<ul class="legend">{"".join(keys)}</ul>',
        f'<div class="devices">{cards}</div>',
    )


def _alike(report: PlanReport) -> list[list[int]]:
    """The ranks, together where they are of one stage and hold the same."""
    groups: dict[object, list[int]] = {}
    for shard in report.plan.shards:
        uses = _uses(report, shard.rank)
        held = tuple((use.budget_bytes, *use.parts.items()) for use in uses)
        groups.setdefault((shard.stage, held), []).append(shard.rank)
    return list(groups.values())


def _uses(report: PlanReport, rank: int) -> tuple[MemoryUse, ...]:
    return report.uses[rank * len(Tier) : (rank + 1) * len(Tier)]


def _card(report: PlanReport, ranks: list[int]) -> str:
    shards = [report.plan.shards[rank] for rank in ranks]
    stage = report.plan.stages[shards[0].stage]
    names = escape(", ".join(f"{shard.node}/{shard.device}" for shard in shards))
    each = ", each" if len(ranks) > 1 else ""
    where = f"stage {stage.index}, layers {stage.first_layer}-{stage.end_layer - 1}{each}"
    bars = "".join(_bar(use) for use in _uses(report, ranks[0]) if use.budget_bytes)
    return f'<div class="device"><h3>{names}<br><span class="quiet">{where}</span></h3>{bars}</div>'


def _bar(use: MemoryUse) -> str:
    parts = "".join(
        f'<span class="{kind}" style="flex:{num_bytes / use.budget_bytes:.6f} 0 0" '
        f'title="{kind}: {format_bytes(num_bytes)}"></span>'
        for kind, num_bytes in use.parts.items()
    )
    used = use.budget_bytes - use.parts.get("free", 0)
    says = (
        f"{format_bytes(used)} of {format_bytes(use.budget_bytes)} ({100 * use.used_share:.0f} %)"
    )
    tier = TIER_NAMES[use.tier]
    return (
        f'<div class="tier"><span>{tier}</span>'
        f'<div class="bar" role="img" aria-label="{tier}: {says}">{parts}</div>'
        f"<small>{says}</small></div>"
    )


def _pass(report: PlanReport) -> str:
    work, pass_s = report.work, report.timeline.pass_s
    note = (
        f"A decode pass of {work.num_sequences} sequences takes {seconds(pass_s)} from the first "
        f"stage to the last, {work.passes_in_flight} in flight. Weights that do not stay are read "
        "ahead, as far as the ring has room. Point at a bar to see its unit."
    )
    return section("A pass in time", note, lanes(report.timeline))


def _forecast(report: PlanReport) -> str:
    terms = report.plan.forecast.terms_s
    by_time = sorted(terms.items(), key=lambda item: -item[1])
    passes = _table(
        ("decode pass, slowest stage", "takes"),
        [(name, seconds(time)) for name, time in by_time if time],
    )
    moved = _table(
        ("decode pass, all devices", "moves"),
        [(link, format_bytes(size)) for link, size in report.work.moved_bytes.items() if size],
    )
    held = totals(report.uses)
    memory = _table(
        ("memory, all devices", *(TIER_NAMES[tier] for tier in Tier)),
        [
            (kind, *(format_bytes(held[kind, tier]) if held[kind, tier] else "-" for tier in Tier))
            for kind in KINDS
            if any(held[kind, tier] for tier in Tier)
        ],
    )
    note = "The device, the host link and the disk work at the same time: the slowest binds."
    return section("Forecast", note, passes, "<br>", moved, "<br>", memory)


def _runners_up(report: PlanReport) -> str:
    rows = [
        (
            layout(other.plan),
            f"{other.plan.forecast.tokens_per_s:.4g}",
            seconds(other.plan.forecast.time_per_output_token_s),
            seconds(other.plan.forecast.time_to_first_token_s),
            other.why,
        )
        for other in report.runners_up
    ]
    if not rows:
        return ""
    headings = ("plan", "tokens/s", "per token", "first token", "why it lost")
    return section("Runners-up", "The next best plans.", _table(headings, rows, "words"))


def _changes(report: PlanReport) -> str:
    rows = [
        (
            change.what,
            f"{change.factor:.2f}x",
            f"{change.plan.forecast.tokens_per_s:.4g}",
            seconds(change.plan.forecast.time_per_output_token_s),
            layout(change.plan),
        )
        for change in report.changes
    ]
    if not rows:
        return ""
    headings = ("change", "better", "tokens/s", "per token", "plan")
    return section("What would change it", "One change at a time.", _table(headings, rows, "words"))


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], style: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
