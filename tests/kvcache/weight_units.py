"""Units of weights with contents that are known."""

from __future__ import annotations

import os

import torch

from kvcache.tier import Tier
from kvcache.unit_layout import UnitLayout
from kvcache.weights import WeightManager

CPU = torch.device("cpu")
TIERS = (Tier.DEVICE, Tier.HOST, Tier.NVME)


def make_units(count: int) -> list[UnitLayout]:
    return [
        UnitLayout.pack(
            f"u{i}",
            [("w", (20 + 37 * (i % 4), 64), torch.float32), ("b", (7 + i,), torch.bfloat16)],
        )
        for i in range(count)
    ]


def expected(unit: UnitLayout) -> dict[str, torch.Tensor]:
    seed = int(unit.name[1:]) + 1
    return {
        slot.name: (torch.arange(slot.num_bytes // slot.dtype.itemsize) % 101 * seed)
        .to(slot.dtype)
        .view(slot.shape)
        for slot in unit.tensors
    }


def fill(unit: UnitLayout, buffer: torch.Tensor) -> None:
    values = expected(unit)
    for slot in unit.tensors:
        slot.view(buffer).copy_(values[slot.name])


def assert_unit(manager: WeightManager, unit: UnitLayout) -> None:
    values = expected(unit)
    tensors = manager.acquire(unit.name)
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(tensors[name], value), (unit.name, name)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
