"""A run's spans as a file for Perfetto (ui.perfetto.dev) or chrome://tracing.

The Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from giantserve.errors import ConfigError
from partition.plan import PartitionPlan

FIRST_LANES = ("passes", "computes with", "waits")
"""Stand above the transfers, so that one sees what is read under what is computed."""


def write_trace(
    path: Path, plan: PartitionPlan, spans: Mapping[int, Sequence[Mapping[str, Any]]]
) -> None:
    """Write the spans of every rank, each a process of the file; seconds count from the first.

    Raises ConfigError where the file cannot be written.
    """
    begin_s = min((span["start_s"] for each in spans.values() for span in each), default=0.0)
    events = [
        event
        for rank, each in sorted(spans.items())
        for event in _events(rank, plan.shards[rank].stage, each, begin_s)
    ]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ConfigError(
            f"cannot write the trace {path}: {error.strerror}; name another file"
        ) from None


def _events(
    rank: int, stage: int, spans: Sequence[Mapping[str, Any]], begin_s: float
) -> Iterator[dict[str, Any]]:
    lanes = sorted(
        {span["lane"] for span in spans},
        key=lambda lane: (FIRST_LANES.index(lane) if lane in FIRST_LANES else 99, lane),
    )
    yield _name("process_name", rank, 0, f"shard {rank}, stage {stage}")
    for number, lane in enumerate(lanes):
        yield _name("thread_name", rank, number, lane)
        yield {
            "ph": "M",
            "name": "thread_sort_index",
            "pid": rank,
            "tid": number,
            "args": {"sort_index": number},
        }
    for index, span in enumerate(spans):
        event = {
            "name": span["what"],
            "cat": span["lane"],
            "pid": rank,
            "tid": lanes.index(span["lane"]),
            "args": {"bytes": span["num_bytes"]} if span["num_bytes"] else {},
        }
        start_us = (span["start_s"] - begin_s) * 1e6
        end_us = (span["end_s"] - begin_s) * 1e6
        if span["lane"] in FIRST_LANES:
            yield {**event, "ph": "X", "ts": start_us, "dur": end_us - start_us}
        else:  # transfers overlap each other
            yield {**event, "ph": "b", "id": index, "ts": start_us}
            yield {**event, "ph": "e", "id": index, "ts": end_us}


def _name(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": lane, "args": {"name": name}}
