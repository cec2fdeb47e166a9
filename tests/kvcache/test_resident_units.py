"""Units that stay in memory are used while others load, and a load that fails says so."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest
import torch

from kvcache.errors import StoreError
from kvcache.tier import Tier
from kvcache.unit_layout import UnitLayout
from kvcache.weights import WeightManager
from tests.kvcache.weight_units import TIERS, assert_unit, expected, fill, make_units


class SlowFill:
    """Fills a unit once the test says so, and fails for those that it should."""

    def __init__(self, units: list[UnitLayout], broken: str | None = None) -> None:
        self.may_fill = {unit.name: threading.Event() for unit in units}
        self.broken = broken

    def __call__(self, unit: UnitLayout, buffer: torch.Tensor) -> None:
        assert self.may_fill[unit.name].wait(30)
        if unit.name == self.broken:
            raise OSError(f"cannot read {unit.name}")
        fill(unit, buffer)

    def allow(self, *names: str) -> None:
        for name in names:
            self.may_fill[name].set()


@pytest.mark.parametrize("tiers", [*itertools.combinations(TIERS[:2], 1), TIERS[:2], TIERS])
def test_units_are_used_while_others_load(
    tiers: tuple[Tier, ...], managers: Callable[..., WeightManager]
) -> None:
    units = make_units(6)
    placements = {unit.name: tiers[i % len(tiers)] for i, unit in enumerate(units)}
    slow = SlowFill(units)
    slow.allow(*(name for name, tier in placements.items() if tier is Tier.NVME))
    arrived: list[str] = []
    manager = managers(
        units,
        placements,
        fill=slow,
        load={"arrived": lambda unit, tensors: arrived.append(unit)},
        wait=False,
    )
    used: list[str] = []

    def run() -> None:
        for _ in range(2):
            for unit in units:
                assert_unit(manager, unit)
                used.append(unit.name)
                manager.release(unit.name)

    reader = threading.Thread(target=run)
    reader.start()
    for count, unit in enumerate(units):
        if placements[unit.name] is Tier.NVME:
            continue
        deadline = time.monotonic() + 30
        while len(used) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        assert used == [each.name for each in units[:count]]
        assert not manager.is_loaded
        slow.allow(unit.name)
    reader.join(30)
    assert used == [unit.name for unit in units] * 2
    manager.wait_until_loaded()
    assert manager.is_loaded
    assert arrived == [name for name, tier in placements.items() if tier is Tier.DEVICE]
    assert manager.transfers.stall_s > 0
    manager.check_integrity()


@pytest.mark.parametrize("broken", ["u1", "u2"])
def test_a_unit_that_cannot_be_loaded_fails_who_needs_it(
    broken: str, managers: Callable[..., WeightManager]
) -> None:
    units = make_units(4)
    tiers = (Tier.DEVICE, Tier.HOST, Tier.DEVICE, Tier.HOST)
    placements = {unit.name: tier for unit, tier in zip(units, tiers, strict=True)}
    slow = SlowFill(units, broken)
    manager = managers(units, placements, fill=slow, wait=False)
    failures: list[BaseException] = []

    def run() -> None:
        for unit in units:
            try:
                assert_unit(manager, unit)
                manager.release(unit.name)
            except OSError as error:
                failures.append(error)
                return

    reader = threading.Thread(target=run)
    reader.start()
    slow.allow(*placements)
    reader.join(30)
    assert [str(error) for error in failures] == [f"cannot read {broken}"]
    with pytest.raises(OSError, match=f"cannot read {broken}"):
        manager.wait_until_loaded()
    assert not manager.is_loaded


def test_units_asked_for_first_are_there_at_once(managers: Callable[..., WeightManager]) -> None:
    units = make_units(4)
    slow = SlowFill(units)
    slow.allow("u2")
    manager = managers(
        units,
        dict.fromkeys(slow.may_fill, Tier.DEVICE),
        fill=slow,
        load={"first": {"u2"}},
        wait=False,
    )
    assert_unit(manager, units[2])
    assert not manager.is_loaded
    slow.allow(*slow.may_fill)
    manager.wait_until_loaded()
    for unit in units:
        assert_unit(manager, unit)


def test_rows_wait_for_their_unit(managers: Callable[..., WeightManager]) -> None:
    for tier in TIERS[:2]:
        units = make_units(2)
        slow = SlowFill(units)
        manager = managers(units, dict.fromkeys(slow.may_fill, tier), fill=slow, wait=False)
        threading.Timer(0.05, slow.allow, slow.may_fill).start()
        rows = manager.gather_rows("u1", "w", torch.tensor([3, 1]))
        assert torch.equal(rows, expected(units[1])["w"][[3, 1]])
        manager.close()


def test_closing_ends_the_load_and_whoever_waits(managers: Callable[..., WeightManager]) -> None:
    units = make_units(3)
    slow = SlowFill(units)
    manager = managers(units, dict.fromkeys(slow.may_fill, Tier.DEVICE), fill=slow, wait=False)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            manager.acquire("u2")
        except StoreError as error:
            ended.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    closer = threading.Thread(target=manager.close)
    closer.start()
    waiter.join(30)
    assert len(ended) == 1
    slow.allow("u0")  # the unit under way is filled; the others are not
    closer.join(30)
    assert not closer.is_alive() and not slow.may_fill["u1"].is_set()
    with pytest.raises(StoreError, match="closed"):
        manager.wait_until_loaded()
