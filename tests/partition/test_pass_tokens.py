"""How many tokens a pass carries beyond what the device computes at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_models import LINK, PAGE, RATES, budget, llama_like

from kvcache.tier import Tier
from partition import ClusterSpec, Constraints, PartitionPlan, PlanError, Workload, plan
from partition.pass_tokens import NO_ROOM, ActivationRoom, activation_room

MIB = 1 << 20
MODEL = llama_like(num_layers=8, hidden=256, inter=1024, max_positions=4096)
ROW = 2 * 256
MANY = Workload(prompt_tokens=512, output_tokens=16, concurrency=32)


def planned(device: int, host: int, nvme: int, disk: float = 1e7, **fixed: int) -> PartitionPlan:
    rates = replace(RATES, disk_read=disk, disk_write=disk)
    cluster = ClusterSpec.local(1, budget(device, host, nvme), rates, LINK)
    made = plan(MODEL, cluster, MANY, constraints=Constraints(**fixed))
    made.validate()
    return made


def test_room_is_on_the_host_and_then_on_nvme() -> None:
    whole = activation_room(MODEL, budget(0, 512 * MIB, 0), 64, 4096)
    assert whole == ActivationRoom(
        host_bytes=4096 * ROW + (2 * 64 + 1) * PAGE,
        max_tokens=4096,
        row_bytes=ROW,
        slice_tokens=64,
    )
    assert whole.for_tokens(640).host_bytes == 640 * ROW + (2 * 10 + 1) * PAGE
    # a sixteenth of the host are 32 pages, of which 24 are buffers for slices of 8 pages
    mixed = activation_room(MODEL, budget(0, 16 * 32 * PAGE, 512 * MIB), 64, 4096)
    assert (mixed.host_bytes, mixed.buffer_bytes) == (32 * PAGE, 3 * 8 * PAGE)
    assert mixed.nvme_bytes == whole.host_bytes - 8 * PAGE + 8 * PAGE
    assert mixed.max_tokens == 4096
    assert activation_room(MODEL, budget(0, 512 * MIB, 0), 64, 64) is NO_ROOM
    assert activation_room(MODEL, budget(0, 1 * MIB, 512 * MIB), 64, 4096) is NO_ROOM


def test_a_pass_carries_what_computes_while_its_weights_are_read() -> None:
    slow = planned(6 * MIB, 64 * MIB, 512 * MIB, disk=1e6)
    assert slow.shards[0].weight_bytes(Tier.NVME) == 0, "the host holds what the device does not"
    made = planned(6 * MIB, 1 * MIB, 512 * MIB, disk=1e7)
    assert made.shards[0].weight_bytes(Tier.NVME) > 0
    assert not made.is_sliced, "a sixteenth of this host holds no two slices"


def test_more_tokens_are_free_the_slower_the_disk() -> None:
    """Weights that lie on NVMe because the host has little more than room for states."""
    tokens = []
    for disk in (1e9, 1e8, 1e7):
        made = planned(8 * MIB, 8 * MIB, 512 * MIB, disk=disk)
        shard = made.shards[0]
        assert shard.weight_bytes(Tier.NVME) > 0
        assert made.is_sliced == (shard.host_activation_bytes > 0)
        tokens.append(made.max_num_batched_tokens)
    assert tokens[0] == made.max_slice_tokens < tokens[1] < tokens[2]


def test_weights_that_stay_leave_nothing_free() -> None:
    made = planned(512 * MIB, 512 * MIB, 0)
    assert not made.is_sliced
    assert made.shards[0].host_activation_bytes == 0


def test_a_pass_of_the_users_size_is_cut_into_slices() -> None:
    made = planned(8 * MIB, 64 * MIB, 512 * MIB, max_num_batched_tokens=4000)
    assert made.max_num_batched_tokens == 4000 and made.max_slice_tokens < 1000
    held = made.shards[0].host_activation_bytes
    assert held >= 4000 * ROW
    assert made.shards[0].used_bytes(Tier.HOST) >= held


def test_a_plan_that_slices_without_room_is_refused() -> None:
    made = planned(512 * MIB, 512 * MIB, 0)
    broken = replace(made, max_num_batched_tokens=made.max_slice_tokens + 1)
    with pytest.raises(PlanError, match="host_activation_bytes"):
        broken.validate()
