"""Budgets, recounted apart from the planner on many random plans."""

from __future__ import annotations

from random import Random

from planner_models import LINK, PAGE, RATES, budget, llama_like

from kvcache.layout import STORAGE_DTYPES
from kvcache.micro_batch import NUM_BUFFERS
from kvcache.tier import Tier
from partition import (
    ClusterSpec,
    Constraints,
    DeviceSpec,
    ModelProfile,
    NodeSpec,
    Objective,
    PartitionPlan,
    Workload,
)
from partition.plan_queue import PlanQueue


def test_no_plan_of_ten_thousand_exceeds_a_budget() -> None:
    random, checked = Random(1), 0
    while checked < 10_000:
        model = llama_like(
            num_layers=random.randint(1, 4),
            inter=32 * random.randint(1, 12),
            tied=random.random() < 0.3,
        )
        cluster = _cluster(random)
        load = Workload(prompt_tokens=48, output_tokens=16, concurrency=random.randint(1, 8))
        fixed = Constraints(
            max_num_batched_tokens=64,
            kv_storage_dtypes=tuple(random.sample(STORAGE_DTYPES, random.randint(1, 3))),
            prefix_memory=random.choice([None, 40 * PAGE]),
        )
        queue = PlanQueue(model, cluster, load, Objective.MAX_THROUGHPUT, fixed)
        for made in queue.ranked("", 12):
            made.validate()
            _recount(made, model, cluster)
            checked += 1


def _cluster(random: Random) -> ClusterSpec:
    def device() -> DeviceSpec:
        return DeviceSpec(
            budget=budget(
                random.randint(30, 200) * PAGE,
                random.choice([0, 20, 60]) * PAGE,
                random.choice([0, 500]) * PAGE,
            ),
            bandwidths=RATES,
            staged=random.random() < 0.5,
        )

    nodes = tuple(
        NodeSpec(
            name=f"node-{index}",
            devices=(device(),) * random.randint(1, 2),
            link=LINK,
            shared=random.choice([(), ("disk",)]),
        )
        for index in range(random.randint(1, 3))
    )
    return ClusterSpec(nodes=nodes, network=LINK)


def _recount(made: PartitionPlan, model: ModelProfile, cluster: ClusterSpec) -> None:
    """Every byte that a shard holds, from the model alone, against its own device's budget."""
    nodes = {node.name: node for node in cluster.nodes}
    world = made.tensor_parallel
    for stage in made.stages:
        run = stage.first_layer, stage.end_layer
        units = {unit.name: unit for unit in model.stage_units(*run)}
        for shard in stage.shards:
            node = nodes[shard.node]
            device = node.devices[node.device_names.index(shard.device)]
            layout = model.kv_layout(
                *run, made.block_size, shard.tp_rank, world, made.kv_storage_dtype
            )
            layers = range(len(layout.layers))
            pages = [-(-layout.piece(i).num_bytes // 4096) * 4096 for i in layers]
            stored = [-(-layout.stored_piece(i).num_bytes // 4096) * 4096 for i in layers]
            rotating = NUM_BUFFERS * made.num_rotation_slots
            held = dict.fromkeys(Tier, 0)
            assert [placement.unit for placement in shard.placements] == list(units)
            for placement in shard.placements:
                unit = units[placement.unit]
                held[placement.tier] += unit.num_bytes(model.heads, shard.tp_rank, world)
            held[Tier.DEVICE] += made.num_device_blocks * layout.block_bytes
            held[Tier.DEVICE] += shard.ring_bytes + shard.workspace_bytes
            held[Tier.DEVICE] += rotating * max(pages)
            held[Tier.HOST] += shard.staging_bytes
            if device.staged or made.kv_storage_dtype != "auto":
                assert shard.staging_bytes >= rotating * max(stored)
            host_blocks = made.num_host_blocks + made.num_rotating_host_blocks
            held[Tier.HOST] += host_blocks * layout.stored_block_bytes
            held[Tier.HOST] += made.num_tail_blocks * layout.block_bytes
            held[Tier.NVME] += made.num_rotating_nvme_blocks * sum(stored)
            limits = device.budget
            assert held[Tier.DEVICE] <= limits.device_bytes
            assert held[Tier.HOST] <= limits.host_bytes
            assert held[Tier.NVME] <= limits.nvme_bytes
