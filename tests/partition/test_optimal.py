"""The planner against all plans there are, on random small problems."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import Oracle
from planner_models import LINK, PAGE, RATES, budget, llama_like

from kvcache.tier import TierBudget
from partition import (
    ClusterSpec,
    CodecRate,
    Constraints,
    DeviceSpec,
    DiskRate,
    Link,
    ModelProfile,
    NodeSpec,
    Objective,
    Workload,
)
from partition.plan_queue import PlanQueue
from partition.sizing import Sizing, least_sizing, sizings
from partition.stage_table import StageTable

SLOW_LINK = Link(bandwidth=1e8, latency_s=2e-5)
BY_SIZE = replace(
    RATES,
    disk_blocks=(
        DiskRate(block_bytes=PAGE, read=2e8, write=1e8),
        DiskRate(block_bytes=16 * PAGE, read=8e8, write=5e8),
    ),
    kv_codecs=(CodecRate(storage_dtype="int8", encode=1e9, decode=2e9),),
)
"""A disk with rates of its own for small requests, and KV that is slow to convert."""


@st.composite
def clusters(draw: st.DrawFn) -> ClusterSpec:
    """2 to 6 devices of up to three kinds on 1 to 3 nodes."""
    kinds = [
        DeviceSpec(
            budget=budget(
                draw(st.integers(25, 150)) * PAGE,
                draw(st.sampled_from([0, 8, 40])) * PAGE,
                draw(st.sampled_from([0, 400])) * PAGE,
            ),
            bandwidths=draw(st.sampled_from([RATES, BY_SIZE])).shared_by(
                speed, ("disk", "memory", "compute")
            ),
            staged=draw(st.booleans()),
        )
        for speed in draw(st.permutations([1, 2, 4]))
    ]
    homes = draw(st.lists(st.integers(0, 2), min_size=2, max_size=6))
    nodes = tuple(
        NodeSpec(
            name=f"node-{home}",
            link=LINK,
            shared=draw(st.sampled_from([(), ("disk",), ("disk", "memory", "compute")])),
            devices=tuple(draw(st.sampled_from(kinds)) for here in homes if here == home),
        )
        for home in sorted(set(homes))
    )
    return ClusterSpec(nodes=nodes, network=SLOW_LINK)


@st.composite
def models(draw: st.DrawFn) -> ModelProfile:
    """2 to 4 layers, of 5 to 9 units that stream, some of experts."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    return llama_like(
        num_layers=len(sizes),
        mlp_sizes=tuple(64 * size for size in sizes),
        max_positions=64,
        num_experts=draw(st.sampled_from([0, 16])),
    )


@settings(max_examples=300, deadline=None)
@given(model=models(), cluster=clusters(), stages=st.integers(1, 3), data=st.data())
def test_the_plan_is_as_good_as_the_best_of_all(
    model: ModelProfile, cluster: ClusterSpec, stages: int, data: st.DataObject
) -> None:
    alike = [node.devices.count(device) for node in cluster.nodes for device in set(node.devices)]
    tensor = data.draw(st.sampled_from([1, 1, min(2, max(alike))]))
    workload = Workload(prompt_tokens=16, output_tokens=16, concurrency=2)
    fixed = Constraints(
        tensor_parallel=tensor, expert_parallel=False, max_num_batched_tokens=64, max_model_len=32
    )
    oracle = Oracle(model, cluster, workload, fixed, tensor)
    count = min(stages, model.num_layers, sum(count // tensor for count in alike))
    best = oracle.best_rate(_sizings(model, cluster, workload, fixed, count), count)
    if best == 0:
        width = StageTable(model, tensor).width
        best = oracle.best_rate([least_sizing(model, width, fixed)], count)
    fixed = replace(fixed, pipeline_parallel=count)
    queue = PlanQueue(model, cluster, workload, Objective.MAX_THROUGHPUT, fixed)
    rate = max((made.forecast.tokens_per_s for made in queue.ranked("", 1)), default=0.0)
    assert rate == pytest.approx(best, rel=1e-4)


def _sizings(
    model: ModelProfile,
    cluster: ClusterSpec,
    workload: Workload,
    fixed: Constraints,
    stages: int,
) -> list[Sizing]:
    budgets = [device.budget for node in cluster.nodes for device in node.devices]
    least = TierBudget(
        device_bytes=0,
        host_bytes=min(each.host_bytes for each in budgets),
        nvme_bytes=min(each.nvme_bytes for each in budgets),
    )
    width = StageTable(model, fixed.tensor_parallel or 1).width
    return list(
        dict.fromkeys(
            sizing
            for size in {each.device_bytes for each in budgets}
            for sizing in sizings(
                model,
                replace(least, device_bytes=size),
                width,
                stages,
                workload,
                fixed,
            )
        )
    )
