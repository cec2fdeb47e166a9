"""Which units of one shard lie on which tier: an exact integer program over classes of equal
units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvcache.tier import Tier
from partition.cost import PAGE_BYTES

RING_DEPTHS = (4, 3, 2)
"""How many of the largest streamed units the ring holds, the first that fits: with the one in use
and the next alone the disk waits wherever units are unequal."""

TIE_BREAK = 1e-6
"""What keeping every byte on faster tiers may cost in time, as a share of reading the largest
unit."""


class UnitClass(NamedTuple):
    """``number`` units of ``size`` bytes, of which ``routed`` are experts that a pass may leave
    out."""

    size: int
    number: int
    routed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierProblem:
    """One shard's choice. All sizes are page-rounded bytes; capacities are what weights may take.

    ``classes`` are those of the units that stream from wherever they lie, sizes falling;
    ``routed_share`` is the part of their routed experts that a pass reads, once it has computed
    up to the router (1: it reads all ahead);
    ``embedding`` is the size of the embedding, of which a pass reads rows only (0: none).
    ``staged``: the host holds two buffers for the largest streamed unit on NVMe.
    ``floor_s`` is the time below which fewer streamed bytes gain nothing. ``expert_disk`` is the
    disk's rate for reads as long as an expert's tensor (None: ``disk``).
    """

    classes: tuple[UnitClass, ...]
    embedding: int
    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    floor_s: float
    host_link: float
    disk: float
    staged: bool = False
    routed_share: float = 1.0
    expert_disk: float | None = None

    @property
    def stream_bytes(self) -> int:
        return sum(each.size * each.number for each in self.classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChoice:
    """Units of each class by tier, the embedding's tier (None: no embedding), and the ring they
    need."""

    resident: tuple[int, ...]
    on_host: tuple[int, ...]
    on_nvme: tuple[int, ...]
    embedding: Tier | None
    ring_bytes: int
    staging_bytes: int
    streamed_bytes: int
    disk_bytes: int
    streamed_experts: int
    disk_experts: int
    free_device_bytes: int


def ring_bytes(streamed: list[int], depth: int) -> int:
    """The ring for these streamed sizes: its ``depth`` largest, each with a page for alignment."""
    return sum(size + PAGE_BYTES for size in sorted(streamed, reverse=True)[:depth])


def choose_tiers(problem: TierProblem) -> TierChoice | None:
    """The tiers with the least ``max(floor + routed experts, streamed / link, disk bytes / disk)``;
    None: nothing fits.

    The ring comes first: it is as deep as `RING_DEPTHS` allows, and what is left pins units. Ties
    go to the faster tiers. Pinning is optimal because a pass is a cyclic scan: every byte that
    is not resident moves once a pass, whichever it is, but for experts that it leaves out.
    """
    if min(problem.device_bytes, problem.host_bytes, problem.nvme_bytes) < 0:
        return None
    counts = tuple(each.number for each in problem.classes)
    if problem.stream_bytes <= problem.device_bytes:
        none = (0,) * len(counts)
        return _finish(problem, counts, none, none, 0)
    deepest = (_choose(problem, depth) for depth in RING_DEPTHS)
    return next((choice for choice in deepest if choice is not None), None)


def _choose(problem: TierProblem, depth: int) -> TierChoice | None:
    """The best choice with a ring of this depth."""
    shrink = 0.0
    for _ in range(4):  # the solver's tolerance may overstep a capacity by a few bytes in a billion
        solution = _solve(problem, depth, shrink)
        if solution is None:
            return None
        resident, on_host, on_nvme = solution
        choice = _finish(problem, resident, on_host, on_nvme, depth)
        if choice is not None:
            return choice
        shrink = max(4 * shrink, 1e-7)
    return None


def _finish(
    problem: TierProblem,
    resident: tuple[int, ...],
    on_host: tuple[int, ...],
    on_nvme: tuple[int, ...],
    depth: int,
) -> TierChoice | None:
    """Check the counts in exact integers, move units up into what is free, place the embedding."""
    sizes = [each.size for each in problem.classes]
    routed = [each.routed for each in problem.classes]
    on_device, in_host, in_nvme = list(resident), list(on_host), list(on_nvme)

    def ring() -> int:
        streamed = [
            size
            for size, h, n in zip(sizes, in_host, in_nvme, strict=True)
            for _ in range(min(h + n, depth))
        ]
        return ring_bytes(streamed, depth)

    def total(counts: list[int], of: list[int] = sizes) -> int:
        return sum(s * c for s, c in zip(of, counts, strict=True))

    def staging() -> int:
        read = (size for size, count in zip(sizes, in_nvme, strict=True) if count)
        return 2 * max(read, default=0) if problem.staged else 0

    def free() -> dict[Tier, int]:
        return {
            Tier.DEVICE: problem.device_bytes - total(on_device) - ring(),
            Tier.HOST: problem.host_bytes - total(in_host) - staging(),
            Tier.NVME: problem.nvme_bytes - total(in_nvme),
        }

    left = free()
    if min(left.values()) < 0:
        return None
    everything = problem.stream_bytes + problem.embedding <= problem.device_bytes
    order = [Tier.HOST, Tier.NVME, Tier.DEVICE]
    if everything:
        order = [Tier.DEVICE]
    embedding = next((t for t in order if problem.embedding <= left[t]), None)
    if problem.embedding and embedding is None:
        return None
    reserved = {t: problem.embedding if t is embedding else 0 for t in Tier}
    moves = ((in_nvme, on_device), (in_host, on_device), (in_nvme, in_host))
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for source, target in moves:
            while source[i]:
                source[i], target[i] = source[i] - 1, target[i] + 1
                if any(free()[t] < reserved[t] for t in (Tier.DEVICE, Tier.HOST)):
                    source[i], target[i] = source[i] + 1, target[i] - 1
                    break
    return TierChoice(
        resident=tuple(on_device),
        on_host=tuple(in_host),
        on_nvme=tuple(in_nvme),
        embedding=embedding if problem.embedding else None,
        ring_bytes=ring(),
        staging_bytes=staging(),
        streamed_bytes=total(in_host) + total(in_nvme),
        disk_bytes=total(in_nvme),
        streamed_experts=total(in_host, routed) + total(in_nvme, routed),
        disk_experts=total(in_nvme, routed),
        free_device_bytes=free()[Tier.DEVICE] - reserved[Tier.DEVICE],
    )


def _solve(
    problem: TierProblem, depth: int, shrink: float
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Counts on device, host and NVMe from HiGHS; capacities are lowered by the share ``shrink``.

    Per class: d resident and h on the host (the rest on NVMe), z whether any is read from NVMe, and
    for j up to the ring's depth whether j units or more of this size and above stream. Then e_d and
    e_h for the embedding, the ring r, the staging s and the time t. With the sizes falling, the sum
    of the ``depth`` largest streamed ones is that of (size - next size) times how many of the
    ``depth`` are of this size or above.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [each.size for each in problem.classes]
    counts = [each.number for each in problem.classes]
    n = len(sizes)
    d, h, z, *reached = (range(k * n, (k + 1) * n) for k in range(3 + depth))
    e_d, e_h, r, s, t = range((3 + depth) * n, (3 + depth) * n + 5)
    scale = float(
        max(sizes)
    )  # bytes in units of the largest class, times in those of one of its reads
    size = [s / scale for s in sizes]
    routed = [each.routed * problem.routed_share / scale for each in problem.classes]
    left_out = [each.routed * (1 - problem.routed_share) / scale for each in problem.classes]
    moved = [s - out for s, out in zip(size, left_out, strict=True)]
    all_moved = sum(m * count for m, count in zip(moved, counts, strict=True))
    slot = [*((s + PAGE_BYTES) / scale for s in sizes), 0.0]
    embedding = problem.embedding / scale
    stream = problem.stream_bytes / scale
    rows: list[dict[int, float]] = []
    upper: list[float] = []

    def at_most(row: dict[int, float], limit: float) -> None:
        rows.append(row)
        upper.append(limit)

    keep = (1 - shrink) / scale
    at_most(
        {**{d[c]: size[c] for c in range(n)}, e_d: embedding, r: 1.0}, problem.device_bytes * keep
    )
    at_most(
        {**{h[c]: size[c] for c in range(n)}, e_h: embedding, s: 1.0}, problem.host_bytes * keep
    )
    off_nvme = {**{d[c]: -size[c] for c in range(n)}, **{h[c]: -size[c] for c in range(n)}}
    at_most(
        {**off_nvme, e_d: -embedding, e_h: -embedding},
        problem.nvme_bytes * keep - stream - embedding,
    )
    at_most({e_d: 1.0, e_h: 1.0}, 1.0)
    per_link = problem.disk / problem.host_link
    at_most({**{d[c]: -moved[c] for c in range(n)}, t: -1 / per_link}, -all_moved)
    read = {**{d[c]: -moved[c] for c in range(n)}, **{h[c]: -moved[c] for c in range(n)}}
    at_most({**read, t: -1.0}, -all_moved)
    floor = problem.floor_s * problem.disk / scale
    if problem.routed_share < 1:
        all_routed = sum(r * count for r, count in zip(routed, counts, strict=True))
        slower = problem.disk / (problem.expert_disk or problem.disk)
        waits = {**{d[c]: -slower * routed[c] for c in range(n)}}
        waits |= {h[c]: (per_link - slower) * routed[c] for c in range(n)}
        at_most({**waits, t: -1.0}, -floor - slower * all_routed)
    for c in range(n):
        at_most({d[c]: 1.0, h[c]: 1.0}, counts[c])
        above = range(c + 1)
        num_above = sum(counts[: c + 1])
        for j, reaches in enumerate(reached):  # streamed <= j unless reached
            row = {d[i]: -1.0 for i in above}
            at_most({**row, reaches[c]: j - num_above}, j - num_above)
        if problem.staged:
            at_most({d[c]: -1.0, h[c]: -1.0, z[c]: -counts[c]}, -counts[c])
            at_most({z[c]: 2 * size[c], s: -1.0}, 0.0)
    steps = {reaches[c]: slot[c] - slot[c + 1] for reaches in reached for c in range(n)}
    at_most({**steps, r: -1.0}, 0.0)
    num = t + 1
    matrix = np.zeros((len(rows), num))
    for index, row in enumerate(rows):
        for column, value in row.items():
            matrix[index, column] = value
    lower_bounds = np.zeros(num)
    lower_bounds[t] = floor
    upper_bounds = np.array([*counts, *counts, *[1.0] * ((1 + depth) * n), 1.0, 1.0, *[np.inf] * 3])
    cost = np.zeros(num)
    cost[t] = 1.0
    for c in range(n):
        cost[d[c]] = -2 * TIE_BREAK * size[c] / stream
        cost[h[c]] = -TIE_BREAK * size[c] / stream
    result = milp(
        cost,
        constraints=LinearConstraint(matrix, ub=np.array(upper)),
        integrality=np.array([1] * ((3 + depth) * n + 2) + [0, 0, 0]),
        bounds=Bounds(lower_bounds, upper_bounds),
        options={"mip_rel_gap": 1e-9, "time_limit": 5.0},
    )
    if result.x is None:
        return None
    x = [round(float(value)) for value in result.x[: 2 * n]]
    resident, on_host = tuple(x[:n]), tuple(x[n : 2 * n])
    on_nvme = tuple(c - a - b for c, a, b in zip(counts, resident, on_host, strict=True))
    return resident, on_host, on_nvme
