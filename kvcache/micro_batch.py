"""Which blocks share the device's rotation buffer: bookkeeping alone, no bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NUM_BUFFERS = 3
"""Of the rotation: one that is attended to, one that is read into, one that is written back."""


CHUNK_BYTES = 1 << 20
"""What is read from NVMe at once, of neighbouring blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockUse:
    """What one sequence needs of its blocks in a pass: the first ``num_loaded`` hold earlier
    tokens, those from ``first_written`` on take new ones. ``unfinished``: the pass leaves room in
    the last block, so that the next pass writes to it again."""

    block_ids: tuple[int, ...]
    num_loaded: int
    first_written: int
    unfinished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Blocks that are on the device together, a layer at a time.

    ``blocks[slot]`` is the block whose piece comes to a slot; the first ``num_loaded`` of them hold
    earlier tokens, in ascending order; ``written`` are the slots that take new ones, ``unfinished``
    those of them that will take more. ``members`` are the positions of the sequences in the pass.
    """

    members: tuple[int, ...]
    blocks: tuple[int, ...]
    num_loaded: int
    written: tuple[int, ...]
    unfinished: frozenset[int] = frozenset()

    @property
    def slots(self) -> Mapping[int, int]:
        """By block the slot to which it comes."""
        return {block: slot for slot, block in enumerate(self.blocks)}


def deal(uses: Mapping[int, BlockUse], num_slots: int) -> tuple[MicroBatch, ...]:
    """Cut the sequences ``uses`` (by position in the pass), in their order, into as few
    micro-batches as ``num_slots`` allow. A block that several share comes once.

    Raises ValueError for a sequence that needs more slots than there are.
    """
    dealt: list[MicroBatch] = []
    members: list[int] = []
    taken: set[int] = set()
    for position, use in uses.items():
        if len(use.block_ids) > num_slots:
            raise ValueError(
                f"a sequence of {len(use.block_ids)} blocks cannot pass through {num_slots} slots"
            )
        together = taken.union(use.block_ids)
        if len(together) > num_slots:
            dealt.append(_micro_batch(uses, members))
            members, together = [], set(use.block_ids)
        members.append(position)
        taken = together
    if members:
        dealt.append(_micro_batch(uses, members))
    return tuple(dealt)


def _micro_batch(uses: Mapping[int, BlockUse], members: Sequence[int]) -> MicroBatch:
    loaded: set[int] = set()
    written: set[int] = set()
    for use in (uses[position] for position in members):
        loaded.update(use.block_ids[: use.num_loaded])
        written.update(use.block_ids[use.first_written :])
    last = {uses[p].block_ids[-1] for p in members if uses[p].unfinished}
    blocks = (*sorted(loaded), *sorted(written - loaded))
    slots = {block: slot for slot, block in enumerate(blocks)}
    return MicroBatch(
        members=tuple(members),
        blocks=blocks,
        num_loaded=len(loaded),
        written=tuple(sorted(slots[block] for block in written)),
        unfinished=frozenset(slots[block] for block in last),
    )
