"""A pass in time, drawn: a strip a stage, a lane for everything that works at the same time."""

from __future__ import annotations

from html import escape

from giantserve.cli.plan_table import seconds
from partition.timeline import LANES, Event, Timeline

WIDTH = 1000
LANE_HEIGHT = 18
GAP = 0.4
"""What is left between one bar and the next; but no bar is thinner than this."""

TICKS = 5


def lanes(timeline: Timeline) -> str:
    """The strips and their axis, as HTML with inline SVG."""
    used = [lane for lane in LANES if any(event.lane == lane for event in timeline.events)]
    strips = (_strip(timeline, stage, used) for stage in range(len(timeline.ranks)))
    ticks = (
        f"<span>{seconds(timeline.pass_s * tick / (TICKS - 1)) if tick else '0'}</span>"
        for tick in range(TICKS)
    )
    keys = "".join(f'<li><i class="{_class(lane)}"></i>{lane}</li>' for lane in used)
    return (
        f'<ul class="legend">{keys}<li class="quiet">faint: for another pass</li></ul>'
        f'{"".join(strips)}<div class="axis quiet">{"".join(ticks)}</div>'
    )


def _strip(timeline: Timeline, stage: int, used: list[str]) -> str:
    height = LANE_HEIGHT * len(used)
    events = [event for event in timeline.events if event.stage == stage]
    rects = "".join(_rect(event, timeline.pass_s, used) for event in events)
    labels = "".join(f"<div>{lane}</div>" for lane in used)
    return (
        f'<div class="stage"><h3>stage {stage} <span class="quiet">rank {timeline.ranks[stage]}, '
        f'its slowest</span></h3><div class="lane">{labels}</div><div class="lanes">'
        f'<svg viewBox="0 0 {WIDTH} {height}" height="{height}" preserveAspectRatio="none" '
        f'role="img" aria-label="stage {stage}: {len(events)} events in '
        f'{seconds(timeline.pass_s)}">{rects}</svg></div></div>'
    )


def _rect(event: Event, pass_s: float, used: list[str]) -> str:
    x = WIDTH * event.start_s / pass_s
    width = max(GAP, WIDTH * (event.end_s - event.start_s) / pass_s - GAP)
    y = LANE_HEIGHT * used.index(event.lane) + 2
    faint = " ahead" if event.ahead else ""
    says = f"{event.unit}: {event.lane} {seconds(event.end_s - event.start_s)}"
    return (
        f'<rect class="{_class(event.lane)}{faint}" x="{x:.2f}" y="{y}" width="{width:.2f}" '
        f'height="{LANE_HEIGHT - 4}"><title>{escape(says)}</title></rect>'
    )


def _class(lane: str) -> str:
    return lane.replace(" ", "-")
