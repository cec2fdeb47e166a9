"""Single experts of a unit, read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.arena import ALIGNMENT, Arena
from kvcache.errors import CorruptUnitError, StorageError
from kvcache.expert_reader import expert_extents
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier
from kvcache.transfer_stats import Link
from kvcache.unit_layout import UnitLayout
from kvcache.weights import WeightManager

NUM_EXPERTS = 12
TENSORS = [
    ("up", (NUM_EXPERTS, 50, 33), torch.float32),
    ("router", (NUM_EXPERTS, 33), torch.float32),
    ("down", (NUM_EXPERTS, 33, 25), torch.float32),
]
UNIT = UnitLayout.pack("mlp", TENSORS, by_expert=("up", "down"))
Maker = Callable[..., WeightManager]


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape, dtype in TENSORS
    }


def fill(unit: UnitLayout, buffer: torch.Tensor) -> None:
    for slot in unit.tensors:
        slot.view(buffer).copy_(values()[slot.name])


@pytest.fixture
def manager_of(tmp_path: Path) -> Iterator[Maker]:
    """Makes a manager of one unit on a tier; closes it."""
    made: list[WeightManager] = []

    def make(tier: Tier) -> WeightManager:
        manager = WeightManager(
            units=[UNIT],
            placements={"mlp": tier},
            device=torch.device("cpu"),
            device_arena=Arena(Tier.DEVICE, 8 << 20),
            host_arena=Arena(Tier.HOST, 8 << 20),
            ring_bytes=UNIT.num_bytes,
            store=ShardStore(tmp_path / "weights", "key"),
        )
        made.append(manager)
        manager.load(fill)
        manager.wait_until_loaded()
        return manager

    yield make
    for manager in made:
        manager.close()


def moved(manager: WeightManager, tier: Tier) -> int:
    return manager.transfers.snapshot()[Link("weights", tier, Tier.DEVICE)].num_bytes


def forget(manager: WeightManager) -> None:
    """Overwrite the ring, so that nothing is there by chance; the prefetch starts anew."""
    manager.acquire("mlp")
    manager._ring_bytes.fill_(255)
    manager.release("mlp")


@pytest.mark.parametrize("tier", [Tier.NVME, Tier.HOST])
def test_only_what_is_asked_for_comes_and_once(tier: Tier, manager_of: Maker) -> None:
    manager = manager_of(tier)
    forget(manager)
    tensors = manager.acquire("mlp")
    assert torch.equal(tensors["router"], values()["router"])
    before = moved(manager, tier)
    manager.acquire_experts("mlp", [1, 2, 7])
    read = moved(manager, tier) - before
    for name in ("up", "down"):
        for expert in (1, 2, 7):
            assert torch.equal(tensors[name][expert], values()[name][expert])
    assert not torch.equal(tensors["up"][9], values()["up"][9])
    exact = 3 * (50 * 33 + 33 * 25) * 4
    assert exact <= read <= exact + 4 * 2 * ALIGNMENT
    manager.acquire_experts("mlp", [1, 2, 7])
    manager.acquire_experts("mlp", [])
    assert moved(manager, tier) - before == read
    manager.acquire_experts("mlp", list(range(NUM_EXPERTS)))
    assert all(torch.equal(tensors[name], value) for name, value in values().items())
    manager.release("mlp")
    manager.check_integrity()


def test_whole_units_come_with_all_experts(manager_of: Maker) -> None:
    manager = manager_of(Tier.NVME)
    manager.whole_experts = True
    forget(manager)
    manager.acquire("mlp")
    manager.release("mlp")
    tensors = manager.acquire("mlp")
    before = moved(manager, Tier.NVME)
    manager.acquire_experts("mlp", [0, 5])
    assert moved(manager, Tier.NVME) == before
    assert all(torch.equal(tensors[name], value) for name, value in values().items())
    manager.release("mlp")


def test_on_the_device_all_experts_are_there(manager_of: Maker) -> None:
    manager = manager_of(Tier.DEVICE)
    tensors = manager.acquire("mlp")
    manager.acquire_experts("mlp", [3])
    assert all(torch.equal(tensors[name], value) for name, value in values().items())


def test_a_flipped_bit_is_found_in_its_expert_alone(manager_of: Maker, tmp_path: Path) -> None:
    manager_of(Tier.NVME).close()
    (file,) = (tmp_path / "weights").glob("*.weights")
    up = next(slot for slot in UNIT.tensors if slot.name == "up")
    with file.open("r+b") as stream:
        stream.seek(up.rows(4, 5)[0] + 100)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 2]))
    manager = manager_of(Tier.NVME)
    tensors = manager.acquire("mlp")
    manager.acquire_experts("mlp", [3, 5])
    assert torch.equal(tensors["up"][3], values()["up"][3])
    with pytest.raises(CorruptUnitError, match=r"unit mlp .* fails its checksum"):
        manager.acquire_experts("mlp", [3, 4, 5])
    manager.release("mlp")


def test_a_file_that_ends_early_is_an_error(manager_of: Maker, tmp_path: Path) -> None:
    manager = manager_of(Tier.NVME)
    manager.acquire("mlp")
    (file,) = (tmp_path / "weights").glob("*.weights")
    os.truncate(file, ALIGNMENT * 2)
    with pytest.raises(StorageError, match="the file ends here"):
        manager.acquire_experts("mlp", [11])
    manager.release("mlp")


def test_a_store_that_was_packed_without_experts_is_packed_again(
    manager_of: Maker, tmp_path: Path
) -> None:
    plain = UnitLayout.pack("mlp", [TENSORS[1], TENSORS[0], TENSORS[2]])
    assert plain.num_bytes == UNIT.num_bytes
    with_experts = manager_of(Tier.NVME)
    (index,) = (tmp_path / "weights").glob("*.json")
    text = index.read_text()
    with_experts.close()
    start, stop = text.index(', "sections"'), text.index("]}")
    index.write_text(text[:start] + text[stop + 1 :])
    manager = manager_of(Tier.NVME)
    assert index.read_text() == text
    manager.acquire("mlp")
    manager.acquire_experts("mlp", [0])
    manager.release("mlp")


@given(st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1))
def test_extents_hold_their_sections_and_no_expert_twice(chosen: set[int]) -> None:
    sections = UNIT.sections()
    seen: list[int] = []
    for low, high, inside in expert_extents(UNIT, sorted(chosen)):
        assert low % ALIGNMENT == high % ALIGNMENT == 0
        for section in inside:
            start, stop = sections[section]
            assert low <= start < stop <= high <= UNIT.num_bytes
        seen += inside
    assert sorted(seen) == sorted(1 + t * NUM_EXPERTS + e for t in range(2) for e in chosen)
