from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from planner_models import LINK, RATES, budget, llama_like

from partition import ClusterSpec, Constraints, PartitionPlan, PlanError, plan


@pytest.fixture(scope="module")
def text() -> str:
    cluster = ClusterSpec.local(2, budget(256 << 10, 128 << 10, 8 << 20), RATES, LINK)
    fixed = Constraints(tensor_parallel=1, pipeline_parallel=2)
    return plan(llama_like(), cluster, constraints=fixed, model="a/b").to_json()


def test_round_trip(text: str) -> None:
    read = PartitionPlan.from_json(text)
    assert read.to_json() == text
    assert read.model == "a/b"


def spoil(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            data = data[key]
        data[last] = value

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoil("version", 99), "version 99"),
        (spoil("colour", 1), "colour: unknown key"),
        (spoil("stages.0.shards.0.colour", 1), r"stages\[0\].shards\[0\].colour: unknown key"),
        (spoil("block_size", "16"), "block_size: must be an integer"),
        (spoil("block_size", True), "block_size: must be an integer"),
        (spoil("block_size", 0), "block_size is 0"),
        (spoil("num_host_blocks", -1), "num_host_blocks is -1"),
        (spoil("forecast.decode_pass_s", None), "decode_pass_s: must be a finite number"),
        (spoil("stages.0.shards.0.placements.0.tier", "tape"), "one of device, host, nvme"),
        (spoil("stages.0.shards.0.rank", 1), "rank contradicts"),
        (spoil("stages.1.first_layer", 3), "first_layer contradicts"),
        (spoil("stages.0.end_layer", 0), "holds no layers"),
        (spoil("tensor_parallel", 2), "tensor_parallel contradicts"),
        (spoil("pipeline_parallel", 3), "pipeline_parallel contradicts"),
        (spoil("passes_in_flight", 0), "passes_in_flight is 0"),
        (spoil("passes_in_flight", 3), "passes_in_flight is 3, but the 2 stages"),
        (spoil("stages.0.shards.0.ring_bytes", 1 << 30), "more than its budget"),
        (spoil("stages.0.shards.0.ring_bytes", -1), "ring_bytes is -1"),
        (spoil("stages.0.shards.0.placements.1.unit", "embedding"), "placed twice"),
        (spoil("max_model_len", 1 << 20), "blocks for running sequences"),
        (lambda data: data.pop("dtype"), "dtype: missing"),
    ],
)
def test_a_spoilt_plan_is_refused(text: str, change: Callable[[Any], None], said: str) -> None:
    data = json.loads(text)
    change(data)
    with pytest.raises(PlanError, match=said):
        PartitionPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("junk", ["", "{", "[]", "null", "7"])
def test_junk_is_refused(junk: str) -> None:
    with pytest.raises(PlanError):
        PartitionPlan.from_json(junk)
