"""Which groups of devices get which stages: all distinct sequences where they are few, good ones
and their neighbours where they are many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice

from partition.device_pool import DevicePool, Group, Sequence

MAX_SEQUENCES = 2000
"""Up to how many sequences of one TP x PP layout are all tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrders:
    """Sequences to try. ``complete``: there are no others."""

    sequences: tuple[Sequence, ...]
    complete: bool


def stage_orders(pool: DevicePool, tensor_parallel: int, pipeline_parallel: int) -> StageOrders:
    """All sequences of groups, but for those that differ in the names of equal nodes only; or, if
    they are more than `MAX_SEQUENCES`, the groups in a few orders of their devices."""
    groups, all_groups = pool.groups(tensor_parallel, pipeline_parallel)
    every = _sequences(pool, groups, pipeline_parallel, list(pool.sizes))
    found = tuple(islice(every, MAX_SEQUENCES + 1)) if all_groups else ()
    if all_groups and len(found) <= MAX_SEQUENCES:
        return StageOrders(sequences=found, complete=True)
    return StageOrders(sequences=pool.dealt(tensor_parallel, pipeline_parallel), complete=False)


def _sequences(
    pool: DevicePool, groups: tuple[Group, ...], length: int, left: list[int]
) -> Iterator[Sequence]:
    """Sequences of the devices that are ``left``, by class."""
    if length == 0:
        yield ()
        return
    for group in groups:
        if any(left[index] < group.count(index) for index in group):
            continue
        if not _first_of_twins(pool, group, left):
            continue
        for index in group:
            left[index] -= 1
        for rest in _sequences(pool, groups, length - 1, left):
            yield (group, *rest)
        for index in group:
            left[index] += 1


def _first_of_twins(pool: DevicePool, group: Group, left: list[int]) -> bool:
    """Whether every node that ``group`` is the first to use comes after all its equals in the
    cluster's order that are in use: the others differ in name only."""
    if not pool.has_twins:
        return True
    homes = {pool.classes[index].node for index in group}
    sizes = enumerate(zip(pool.sizes, left, strict=True))
    known = homes | {pool.classes[index].node for index, (size, rest) in sizes if rest < size}
    return all(
        earlier in known or pool.twins[earlier] != pool.twins[node]
        for node in homes
        for earlier in range(node)
    )


def neighbours(pool: DevicePool, sequence: Sequence, limit: int) -> list[Sequence]:
    """Sequences that differ from ``sequence`` by one swap of two stages' groups, or by one group
    of devices that it leaves unused; ``limit`` at most."""
    used = Counter(index for group in sequence for index in group)
    size = len(sequence[0])
    spare = [(index,) * size for index, has in enumerate(pool.sizes) if has - used[index] >= size]
    return list(islice(dict.fromkeys(_changes(sequence, spare)), limit))


def _changes(sequence: Sequence, spare: list[Group]) -> Iterator[Sequence]:
    for place, group in enumerate(sequence):
        for other in spare:
            if other != group:
                yield (*sequence[:place], other, *sequence[place + 1 :])
    for left, right in combinations(range(len(sequence)), 2):
        if sequence[left] != sequence[right]:
            swapped = list(sequence)
            swapped[left], swapped[right] = sequence[right], sequence[left]
            yield tuple(swapped)
