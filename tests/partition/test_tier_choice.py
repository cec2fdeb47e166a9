from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.tier import Tier
from partition.tier_choice import RING_DEPTHS, TierProblem, UnitClass, choose_tiers, ring_bytes

PAGE = 4096
LINK, DISK = 4e6, 1e6


def time_of(
    problem: TierProblem, streamed: int, on_disk: int, experts: int = 0, experts_on_disk: int = 0
) -> float:
    """Of the experts' bytes that stream a part is read, once the router has spoken."""
    read, left_out = problem.routed_share, 1 - problem.routed_share
    on_host = experts - experts_on_disk
    waits = read * (experts_on_disk / problem.disk + on_host / problem.host_link)
    return max(
        problem.floor_s + (waits if read < 1 else 0.0),
        (streamed - left_out * experts) / problem.host_link,
        (on_disk - left_out * experts_on_disk) / problem.disk,
    )


def brute_force(problem: TierProblem) -> float | None:
    """The least time over every assignment of every unit (and the embedding) to every tier, with
    the deepest ring that any fits beside."""
    by_depth = (brute_force_at(problem, depth) for depth in RING_DEPTHS)
    return next((seconds for seconds in by_depth if seconds is not None), None)


def brute_force_at(problem: TierProblem, depth: int) -> float | None:
    sizes = [size for size, count, _ in problem.classes for _ in range(count)]
    routed = [routed for _, count, routed in problem.classes for _ in range(count)]
    best: float | None = None
    for tiers in product(Tier, repeat=len(sizes) + bool(problem.embedding)):
        used = dict.fromkeys(Tier, 0)
        for size, tier in zip(sizes, tiers, strict=False):
            used[tier] += size
        streamed = [s for s, t in zip(sizes, tiers, strict=False) if t is not Tier.DEVICE]
        on_disk = used[Tier.NVME]
        used[Tier.DEVICE] += ring_bytes(streamed, depth)
        read = [s for s, t in zip(sizes, tiers, strict=False) if t is Tier.NVME]
        staging = 2 * max(read, default=0) if problem.staged else 0
        if problem.embedding:
            used[tiers[-1]] += problem.embedding
        if (
            used[Tier.DEVICE] <= problem.device_bytes
            and used[Tier.HOST] + staging <= problem.host_bytes
            and used[Tier.NVME] <= problem.nvme_bytes
        ):
            experts = {
                tier: sum(r for r, t in zip(routed, tiers, strict=False) if t is tier)
                for tier in Tier
            }
            seconds = time_of(
                problem,
                sum(streamed),
                on_disk,
                experts[Tier.HOST] + experts[Tier.NVME],
                experts[Tier.NVME],
            )
            best = seconds if best is None else min(best, seconds)
    return best


@st.composite
def problems(draw: st.DrawFn) -> TierProblem:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True))
    falling = sorted(sizes, reverse=True)
    share = draw(st.sampled_from([1.0, 0.25]))
    classes = tuple(
        UnitClass(
            size * PAGE,
            draw(st.integers(1, 2)),
            0 if share == 1 else draw(st.integers(0, size)) * PAGE,
        )
        for size in falling
    )
    total = sum(size * count for size, count, _ in classes) // PAGE
    room = st.integers(0, total + 10).map(lambda pages: pages * PAGE)
    return TierProblem(
        classes=classes,
        embedding=draw(st.integers(0, 20)) * PAGE,
        device_bytes=draw(room),
        host_bytes=draw(room),
        nvme_bytes=draw(room),
        floor_s=draw(st.sampled_from([0.0, 0.05])),
        host_link=LINK,
        disk=DISK,
        staged=draw(st.booleans()),
        routed_share=share,
    )


@settings(max_examples=150, deadline=None)
@given(problems())
def test_is_as_fast_as_the_best_of_all_assignments(problem: TierProblem) -> None:
    best = brute_force(problem)
    choice = choose_tiers(problem)
    assert (choice is None) == (best is None)
    if choice is None or best is None:
        return
    seconds = time_of(
        problem,
        choice.streamed_bytes,
        choice.disk_bytes,
        choice.streamed_experts,
        choice.disk_experts,
    )
    assert seconds == pytest.approx(best, rel=1e-4, abs=1e-9)
    held = {tier: problem.embedding if choice.embedding is tier else 0 for tier in Tier}
    for (size, count, _), d, h, n in zip(
        problem.classes, choice.resident, choice.on_host, choice.on_nvme, strict=True
    ):
        assert d + h + n == count
        assert min(d, h, n) >= 0
        for tier, units in zip(Tier, (d, h, n), strict=True):
            held[tier] += size * units
    assert held[Tier.DEVICE] + choice.ring_bytes + choice.free_device_bytes == problem.device_bytes
    assert choice.free_device_bytes >= 0
    assert held[Tier.HOST] + choice.staging_bytes <= problem.host_bytes
    assert held[Tier.NVME] <= problem.nvme_bytes


def test_pins_all_that_fits_beside_the_ring() -> None:
    choice = choose_tiers(
        TierProblem(
            classes=(UnitClass(10 * PAGE, 10),),
            embedding=6 * PAGE,
            device_bytes=74 * PAGE,  # a ring of 4 x 11 pages and 3 units
            host_bytes=27 * PAGE,  # 2 units and the embedding
            nvme_bytes=1000 * PAGE,
            floor_s=0.0,
            host_link=LINK,
            disk=DISK,
        )
    )
    assert choice is not None
    assert (choice.resident, choice.on_host, choice.on_nvme) == ((3,), (2,), (5,))
    assert choice.embedding is Tier.HOST
    assert choice.ring_bytes == 44 * PAGE
    assert (choice.streamed_bytes, choice.disk_bytes) == (70 * PAGE, 50 * PAGE)


def test_pins_the_odd_large_unit_to_keep_the_ring_small() -> None:
    choice = choose_tiers(
        TierProblem(
            classes=(UnitClass(30 * PAGE, 1), UnitClass(10 * PAGE, 6)),
            embedding=0,
            device_bytes=84 * PAGE,
            host_bytes=0,
            nvme_bytes=1000 * PAGE,
            floor_s=0.0,
            host_link=LINK,
            disk=DISK,
        )
    )
    assert choice is not None
    assert choice.resident == (1, 1)
    assert choice.disk_bytes == 50 * PAGE


@pytest.mark.parametrize(("device", "ring"), [(44, 4), (43, 3), (32, 2), (22, 2)])
def test_the_ring_is_as_deep_as_the_device_has_room_for(device: int, ring: int) -> None:
    problem = TierProblem(
        classes=(UnitClass(10 * PAGE, 10),),
        embedding=0,
        device_bytes=device * PAGE,
        host_bytes=0,
        nvme_bytes=1000 * PAGE,
        floor_s=0.0,
        host_link=LINK,
        disk=DISK,
    )
    choice = choose_tiers(problem)
    assert choice is not None and choice.ring_bytes == ring * 11 * PAGE
    assert choose_tiers(replace(problem, device_bytes=21 * PAGE)) is None


def test_what_every_pass_reads_stays_before_experts_do() -> None:
    """Units of the same size, some of them mostly experts of which a pass reads a quarter."""
    experts, dense = UnitClass(10 * PAGE, 8, 9 * PAGE), UnitClass(9 * PAGE, 4)
    choice = choose_tiers(
        TierProblem(
            classes=(experts, dense),
            embedding=0,
            device_bytes=(44 + 4 * 9) * PAGE,
            host_bytes=0,
            nvme_bytes=1000 * PAGE,
            floor_s=0.0,
            host_link=LINK,
            disk=DISK,
            routed_share=0.25,
        )
    )
    assert choice is not None
    assert (choice.resident, choice.on_nvme) == ((0, 4), (8, 0))
    assert choice.disk_experts == 72 * PAGE
