from __future__ import annotations

import time

from planner_models import llama_like

from bench.plan_speed import cluster
from partition import plan


def test_a_giant_over_64_unequal_devices_is_planned_in_seconds() -> None:
    model = llama_like(
        num_layers=126, hidden=16384, inter=53248, vocab=128256, query=128, key_value=8
    )
    nodes = cluster()
    assert (nodes.num_devices, len(nodes.nodes)) == (64, 8)
    start = time.process_time()
    made = plan(model, nodes)
    assert time.process_time() - start < 6  # 0.6 s on two slow cores, which others use too
    assert made.pipeline_parallel * made.tensor_parallel <= 64
