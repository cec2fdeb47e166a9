"""The file that tells what moved and what computed when."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from giantserve import LLM, SamplingParams
from giantserve.errors import ConfigError
from giantserve.trace_file import write_trace
from tests.exactness.plans import make_plan

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def told(
    model_path: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of two stages whose weights stream and whose KV rotates, and the statistics."""
    file = tmp_path_factory.mktemp("trace") / "trace.json"
    plan = make_plan(model_path, 1, 2, "mixed", device_blocks=8, host_blocks=0)
    plan = replace(plan, num_rotating_nvme_blocks=60, num_rotation_slots=40)
    with LLM(model_path, plan=plan, trace=file, **options) as llm:
        llm.generate([[3, 4, 5] * 4, [7, 8, 9] * 7, [6, 5] * 9], GREEDY)
        stats = llm.stats()
    return json.loads(file.read_text())["traceEvents"], stats


def test_every_transfer_is_told_with_its_bytes(
    told: tuple[list[dict[str, Any]], dict[str, Any]],
) -> None:
    events, stats = told
    for rank, shard in enumerate(stats["shards"]):
        moved: Counter[str] = Counter()
        for event in events:
            if event["pid"] == rank and event["ph"] == "b":
                moved[event["cat"]] += event["args"].get("bytes", 0)
        for link in shard["links"]:
            lane = f"{link['kind']}: {link['source']} to {link['target']}"
            # reads ahead go on after the statistics were taken
            assert moved[lane] >= link["bytes"] > 0
        assert any("nvme" in lane and lane.startswith("kv") for lane in moved)
        assert any("nvme" in lane and lane.startswith("weights") for lane in moved)


def test_passes_hold_what_they_compute(
    told: tuple[list[dict[str, Any]], dict[str, Any]],
) -> None:
    events, stats = told
    for rank, shard in enumerate(stats["shards"]):
        own = [e for e in events if e["pid"] == rank and e["ph"] == "X"]
        passes = [e for e in own if e["cat"] == "passes"]
        assert len(passes) >= shard["passes"] >= 6
        for event in own:
            assert event["dur"] >= 0
            if event["cat"] == "computes with":
                assert any(
                    p["ts"] <= event["ts"] and event["ts"] + event["dur"] <= p["ts"] + p["dur"]
                    for p in passes
                ), event


def test_lanes_are_named_and_transfers_end(
    told: tuple[list[dict[str, Any]], dict[str, Any]],
) -> None:
    events, _ = told
    names: dict[int, set[str]] = defaultdict(set)
    open_now: set[tuple[int, int, int]] = set()
    for event in events:
        key = (event["pid"], event["tid"], event.get("id", -1))
        if event["ph"] == "M" and event["name"] == "thread_name":
            names[event["pid"]].add(event["args"]["name"])
        elif event["ph"] == "b":
            open_now.add(key)
        elif event["ph"] == "e":
            open_now.remove(key)
    assert not open_now
    assert set(names) == {0, 1}
    assert all({"passes", "computes with"} <= lanes for lanes in names.values())
    shards = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert shards == ["shard 0, stage 0", "shard 1, stage 1"]


def test_a_file_that_cannot_be_written_is_an_error(model_path: Path, tmp_path: Path) -> None:
    plan = make_plan(model_path, 1, 1, "device", device_blocks=8, host_blocks=0)
    with pytest.raises(ConfigError, match=r"cannot write the trace .*name another file"):
        write_trace(tmp_path / "absent" / "trace.json", plan, {0: []})
