"""The smallest budget with which a model that does not fit would: found by bisection, so it is
true."""

from __future__ import annotations

from collections.abc import Callable

from partition.byte_size import format_bytes
from partition.cluster import ClusterSpec
from partition.cost import PAGE_BYTES
from partition.errors import BudgetError
from partition.profile import ModelProfile

_STEPS = ((1 << 30, 1 << 24), (1 << 24, 1 << 20), (0, PAGE_BYTES))
_NAMES = {
    "device_bytes": "device memory",
    "host_bytes": "host memory",
    "nvme_bytes": "space in nvme_dir",
}


def budget_refusal(
    profile: ModelProfile, cluster: ClusterSpec, fits: Callable[[ClusterSpec], bool]
) -> BudgetError:
    """The error to raise when ``cluster`` does not fit: each tier's smallest mending budget."""
    budgets = [device.budget for node in cluster.nodes for device in node.devices]
    smallest: dict[str, int] = {}
    mends: list[str] = []
    for field, name in _NAMES.items():
        now = min(getattr(budget, field) for budget in budgets)

        def holds(size: int, field: str = field) -> bool:
            return fits(cluster.with_floor(**{field: size}))

        found = _bisect(profile, now, holds)
        if found is not None:
            smallest[field] = found
            mends.append(
                f"{format_bytes(found)} ({found} bytes) of {name}, {format_bytes(found - now)} more"
            )
    have = ", ".join(
        f"{format_bytes(min(getattr(budget, field) for budget in budgets))} of {name}"
        for field, name in _NAMES.items()
    )
    shards = f"{len(budgets)} shard{'s' if len(budgets) > 1 else ''}"
    return BudgetError(
        f"{profile.architecture} ({format_bytes(profile.num_bytes)} of weights) does not fit "
        f"{shards} with {have} each; the smallest budget per shard that would fit is "
        + (" or ".join(mends) if mends else "none of one tier alone: raise more than one"),
        smallest,
    )


def _bisect(profile: ModelProfile, now: int, fits: Callable[[int], bool]) -> int | None:
    """The least size, in whole steps (pages, or MiB where it is large), for which ``fits``
    holds."""
    high = max(now, 4 * PAGE_BYTES)
    limit = 16 * (profile.num_bytes + now) + (64 << 30)
    while not fits(high):
        if high > limit:
            return None
        high *= 2
    low = now
    step = next(step for floor, step in _STEPS if high >= floor)
    low, high = low // step, -(-high // step)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * step):
            high = middle
        else:
            low = middle
    return high * step
