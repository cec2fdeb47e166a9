"""Brings single experts of a unit to their places in its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvcache.arena import ALIGNMENT
from kvcache.shard_store import ShardStore
from kvcache.unit_layout import UnitLayout

_ATTEMPTS = 2


def expert_extents(
    layout: UnitLayout, experts: Sequence[int]
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The bytes [start, stop) of the unit, in whole pages, that hold these rising experts, and the
    sections that lie in them: neighbours are read together."""
    count = layout.num_experts
    for place, slot in enumerate(layout.expert_slots):
        for first, stop in _runs(experts):
            low, high = slot.rows(first, stop)
            sections = range(1 + place * count + first, 1 + place * count + stop)
            yield (
                low // ALIGNMENT * ALIGNMENT,
                -(-high // ALIGNMENT) * ALIGNMENT,
                tuple(sections),
            )


def read_experts(
    store: ShardStore, layout: UnitLayout, experts: Sequence[int], target: torch.Tensor
) -> int:
    """Fill their places in ``target``, the unit's bytes in CPU memory; the bytes that were read.

    A page that an expert shares with its neighbour is read with what the neighbour has there.
    Raises StorageError or CorruptUnitError for what cannot be read in two attempts.
    """
    todo = list(expert_extents(layout, experts))
    num_bytes = sum(high - low for low, high, _ in todo)
    failed: list[tuple[tuple[int, int, tuple[int, ...]], Exception]] = []
    for _ in range(_ATTEMPTS):
        flying = [
            (extent, store.submit_part(layout.name, extent[0], target[extent[0] : extent[1]]))
            for extent in todo
        ]
        failed.clear()
        for extent, future in flying:
            try:
                future.result()
                for section in extent[2]:
                    store.check_section(layout.name, section, target)
            except Exception as failure:  # raised below, when no thread writes to the target
                failed.append((extent, failure))
        if not failed:
            return num_bytes
        todo = [extent for extent, _ in failed]
    raise failed[0][1]


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Maximal ranges [first, stop) of neighbours."""
    start = 0
    for index in range(1, len(experts) + 1):
        if index == len(experts) or experts[index] != experts[index - 1] + 1:
            yield experts[start], experts[index - 1] + 1
            start = index
