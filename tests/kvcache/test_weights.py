"""Every mix of tiers, tiny rings, any order of use, real faults, and nothing left behind."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.arena import Arena
from kvcache.errors import CorruptUnitError, StorageError, StoreError, TierFullError
from kvcache.ring import Ring
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier
from kvcache.transfer_stats import Link
from kvcache.weights import UnitLayout, WeightManager
from tests.kvcache.weight_units import (
    CPU,
    TIERS,
    assert_unit,
    expected,
    fill,
    make_units,
    open_files,
)


@pytest.mark.parametrize("ring_units", [1.0, 1.7, 3.0, 40.0])
@pytest.mark.parametrize("tiers", [*itertools.combinations(TIERS, 1), TIERS[1:], TIERS])
def test_contents_over_cyclic_passes(
    tiers: tuple[Tier, ...], ring_units: float, managers: Callable[..., WeightManager]
) -> None:
    units = make_units(9)
    placements = {unit.name: tiers[i % len(tiers)] for i, unit in enumerate(units)}
    manager = managers(units, placements, ring_units)
    for _ in range(4):
        for unit in units:
            assert_unit(manager, unit)
            manager.check_integrity()
            manager.release(unit.name)
    manager.check_integrity()


def test_bytes_are_counted_exactly(managers: Callable[..., WeightManager]) -> None:
    units = make_units(6)
    placements = {unit.name: TIERS[i % 3] for i, unit in enumerate(units)}
    manager = managers(units, placements, 1.0)
    for _ in range(3):
        for unit in units:
            manager.acquire(unit.name)
            manager.release(unit.name)
    manager.close()
    totals = manager.transfers.snapshot()
    for tier in (Tier.HOST, Tier.NVME):
        moved = [unit.num_bytes for unit in units if placements[unit.name] is tier]
        link = totals[Link("weights", tier, Tier.DEVICE)]
        # Three passes, and what the prefetch took of the fourth.
        ahead = link.num_bytes - 3 * sum(moved)
        assert ahead in (0, moved[0], sum(moved))
        assert link.num_transfers == 6 + (0, moved[0], sum(moved)).index(ahead)
        assert link.busy_s > 0 and link.queue_depth >= 1.0
    plain = manager.stats()["transfers"]["weights_nvme_to_device"]
    assert plain["num_bytes"] == totals[Link("weights", Tier.NVME, Tier.DEVICE)].num_bytes


@pytest.mark.parametrize("ring_units", [1.0, 2.2, 5.0])
def test_any_order_of_use(ring_units: float, managers: Callable[..., WeightManager]) -> None:
    units = make_units(8)
    manager = managers(units, {u.name: TIERS[1 + i % 2] for i, u in enumerate(units)}, ring_units)
    dice = random.Random(1)
    for _ in range(150):
        unit = dice.choice(units)
        assert_unit(manager, unit)
        manager.check_integrity()
        manager.release(unit.name)


def test_skipped_units_do_not_block_the_ring(managers: Callable[..., WeightManager]) -> None:
    units = make_units(8)
    manager = managers(units, {unit.name: Tier.NVME for unit in units}, 3.0)
    for _ in range(10):
        for unit in units[::2]:
            assert_unit(manager, unit)
            manager.release(unit.name)


def test_held_units_stay_and_nested_acquires_count(managers: Callable[..., WeightManager]) -> None:
    units = make_units(8)
    manager = managers(units, {unit.name: Tier.NVME for unit in units}, 3.0)
    held = manager.acquire("u0")
    assert manager.acquire("u0") is held
    manager.release("u0")
    for unit in units[1:]:
        assert_unit(manager, unit)
        manager.release(unit.name)
        for name, value in expected(units[0]).items():
            assert torch.equal(held[name], value)
        manager.check_integrity()
    manager.release("u0")
    with pytest.raises(ValueError, match="not acquired"):
        manager.release("u0")


def test_ring_full_of_held_units_is_an_error(managers: Callable[..., WeightManager]) -> None:
    units = make_units(8)
    manager = managers(units, {unit.name: Tier.NVME for unit in units}, 1.0)
    manager.acquire("u3")
    with pytest.raises(TierFullError):
        manager.acquire("u7")
    manager.release("u3")
    assert_unit(manager, units[7])


def test_truncated_store_is_an_error_and_not_a_hang(
    managers: Callable[..., WeightManager], tmp_path: Path
) -> None:
    units = make_units(8)
    manager = managers(units, {unit.name: Tier.NVME for unit in units}, 1.0)
    (file,) = (tmp_path / "weights").glob("*.weights")
    whole = file.read_bytes()
    os.truncate(file, sum(unit.num_bytes for unit in units[:5]))
    for unit in units[:5]:
        assert_unit(manager, unit)
        manager.release(unit.name)
    for _ in range(2):
        with pytest.raises(StorageError, match="ends here"):
            manager.acquire("u5")
    manager.check_integrity()
    file.write_bytes(whole)
    assert_unit(manager, units[5])


def test_flipped_bit_in_the_store_is_never_served(
    managers: Callable[..., WeightManager], tmp_path: Path
) -> None:
    units = make_units(4)
    placements = {unit.name: Tier.NVME for unit in units}
    managers(units, placements).close()
    (file,) = (tmp_path / "weights").glob("*.weights")
    data = bytearray(file.read_bytes())
    data[units[0].num_bytes + 5] ^= 16
    file.write_bytes(data)
    manager = managers(units, placements)
    assert_unit(manager, units[0])
    manager.release("u0")
    with pytest.raises(CorruptUnitError, match=r"unit u1 .* delete"):
        manager.acquire("u1")
    with pytest.raises(CorruptUnitError, match="unit u1"):
        managers(units, placements, rows_only={"u1"})


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rows_only", [(), ("u0",)])
def test_gathered_rows(
    tier: Tier, rows_only: tuple[str, ...], managers: Callable[..., WeightManager]
) -> None:
    units = [UnitLayout.pack("u0", [("b", (3,), torch.bfloat16), ("w", (500, 33), torch.float32)])]
    manager = managers(units, {"u0": tier}, rows_only=rows_only)
    table = expected(units[0])["w"]
    dice = random.Random(2)
    for count in (1, 7, 300):
        ids = torch.tensor([dice.randrange(500) for _ in range(count)])
        assert torch.equal(manager.gather_rows("u0", "w", ids), table[ids])
    edges = torch.tensor([499, 0, 499, 498])
    assert torch.equal(manager.gather_rows("u0", "w", edges), table[edges])
    assert manager.gather_rows("u0", "w", torch.tensor([], dtype=torch.long)).shape == (0, 33)
    for bad in (-1, 500):
        with pytest.raises(IndexError):
            manager.gather_rows("u0", "w", torch.tensor([0, bad]))
    if rows_only and tier is not Tier.DEVICE:
        with pytest.raises(ValueError, match="u0"):
            manager.acquire("u0")
    if tier is Tier.NVME:
        before = manager.transfers.snapshot()[Link("rows", Tier.NVME, Tier.DEVICE)].num_bytes
        manager.gather_rows("u0", "w", torch.tensor([250, 250]))
        after = manager.transfers.snapshot()[Link("rows", Tier.NVME, Tier.DEVICE)].num_bytes
        assert after - before == 4096


def test_staging_is_counted_and_given_back(tmp_path: Path) -> None:
    units = make_units(4)
    largest = max(unit.num_bytes for unit in units)
    device, host = Arena(Tier.DEVICE, 8 << 20), Arena(Tier.HOST, largest)
    manager = WeightManager(
        units=units,
        placements={unit.name: Tier.NVME for unit in units},
        device=CPU,
        device_arena=device,
        host_arena=host,
        ring_bytes=largest,
        store=ShardStore(tmp_path / "weights", "key"),
    )
    progress: list[int] = []
    manager.load(fill, progress.append)
    assert progress == [unit.num_bytes for unit in units]
    assert (host.peak_bytes, host.used_bytes, device.used_bytes) == (largest, 0, largest)
    manager.close()
    with pytest.raises(StoreError, match="closed"):
        manager.acquire("u0")


def test_failed_load_leaves_nothing(tmp_path: Path) -> None:
    units = make_units(3)
    device, host = Arena(Tier.DEVICE, 1 << 20), Arena(Tier.HOST, 4096)
    files, threads = open_files(), threading.active_count()
    manager = WeightManager(
        units=units,
        placements=dict(zip([unit.name for unit in units], TIERS, strict=True)),
        device=CPU,
        device_arena=device,
        host_arena=host,
        ring_bytes=1 << 16,
        store=ShardStore(tmp_path / "weights", "key"),
    )
    manager.load(fill)
    with pytest.raises(TierFullError, match="host tier"):
        manager.wait_until_loaded()
    assert_unit(manager, units[0])
    for _ in range(2):
        with pytest.raises(TierFullError, match="host tier"):
            manager.acquire("u1")
    assert_unit(manager, units[2])
    manager.release("u2")
    manager.close()
    assert (device.used_bytes, host.used_bytes) == (0, 0)
    assert (open_files(), threading.active_count()) == (files, threads)


def test_impossible_placements_are_refused() -> None:
    units = make_units(2)
    arenas = {"device_arena": Arena(Tier.DEVICE, 1), "host_arena": Arena(Tier.HOST, 1)}
    with pytest.raises(ValueError, match="no store"):
        WeightManager(
            units=units,
            placements={"u0": Tier.NVME, "u1": Tier.DEVICE},
            device=CPU,
            ring_bytes=1 << 20,
            **arenas,
        )
    with pytest.raises(ValueError, match="cannot hold the largest unit"):
        WeightManager(
            units=units,
            placements={"u0": Tier.HOST, "u1": Tier.HOST},
            device=CPU,
            ring_bytes=4096,
            **arenas,
        )


@settings(max_examples=200)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=60))
def test_ring_hands_out_disjoint_extents(capacity: int, steps: list[tuple[int, bool]]) -> None:
    ring = Ring(capacity)
    held: dict[int, int] = {}
    for size, oldest in steps:
        start = ring.allocate(size)
        if start is None:
            assert held or size > capacity
            if held:
                victim = next(iter(held)) if oldest else next(reversed(held))
                ring.free(victim)
                del held[victim]
        else:
            assert start >= 0 and start + size <= capacity
            assert all(start + size <= s or s + n <= start for s, n in held.items())
            held[start] = size
        ring.check_integrity()
        assert ring.num_held == len(held)
    for start in list(held):
        ring.free(start)
    assert ring.allocate(capacity) == 0
    with pytest.raises(ValueError):
        ring.free(1)


def test_layout_is_aligned() -> None:
    layout = UnitLayout.pack(
        "u", [("a", (3,), torch.bfloat16), ("b", (), torch.float32), ("c", (2, 5), torch.int64)]
    )
    assert [slot.offset for slot in layout.tensors] == [0, 64, 128]
    assert layout.num_bytes == 4096
    with pytest.raises(KeyError, match="no tensor d"):
        layout.slot("d")
