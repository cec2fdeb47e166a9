"""Which blocks share the device's rotation buffer: bookkeeping alone, no bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

NUM_BUFFERS = 4
"""Of the rotation: one that is attended to, two that are read into, so that the disk need not wait
for the attention, and one that is written back."""

ACTIVATION_BUFFERS = 3
"""On the host, of a slice's states on their way to and from NVMe: one that is computed, one that is
read, one that is written."""

CHUNK_BYTES = 4 << 20
"""What is read from NVMe at once: each read costs the threads that compute a few tenths of a
millisecond."""

GAP_BYTES = 256 << 10
"""What a read takes along, at most, between two blocks, to spare another read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockUse:
    """What one sequence needs of its blocks in a pass, which adds ``tokens`` to them: positions of
    the sequence, the last of which lies in the last block."""

    block_ids: tuple[int, ...]
    tokens: range
    block_size: int

    def __post_init__(self) -> None:
        assert self.tokens and len(self.block_ids) == -(-self.tokens.stop // self.block_size)

    @property
    def num_loaded(self) -> int:
        """How many of the blocks hold earlier tokens."""
        return -(-self.tokens.start // self.block_size)

    @property
    def written(self) -> Iterator[tuple[int, range]]:
        """The blocks that take new tokens, and their places in them."""
        size = self.block_size
        for index in range(self.tokens.start // size, len(self.block_ids)):
            start, stop = self.tokens.start - index * size, self.tokens.stop - index * size
            yield self.block_ids[index], range(max(0, start), min(stop, size))

    @property
    def is_unfinished(self) -> bool:
        """Whether the pass leaves room in the last block, so that the next writes to it again."""
        return self.tokens.stop % self.block_size > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Blocks that are on the device together, a layer at a time.

    ``blocks[slot]`` is the block whose piece comes to a slot; the first ``num_loaded`` of them hold
    earlier tokens, in ascending order; ``written`` are the slots that take new ones, ascending,
    with their places in the block, ``unfinished`` those of them that will take more. ``members``
    are the positions of the sequences in the pass.
    """

    members: tuple[int, ...]
    blocks: tuple[int, ...]
    num_loaded: int
    written: Mapping[int, range]
    unfinished: frozenset[int] = frozenset()

    @property
    def slots(self) -> Mapping[int, int]:
        """By block the slot to which it comes."""
        return {block: slot for slot, block in enumerate(self.blocks)}


def deal(uses: Mapping[int, BlockUse], num_slots: int) -> tuple[MicroBatch, ...]:
    """Cut the sequences ``uses`` (by position in the pass) into as few micro-batches as
    ``num_slots`` allow, those whose blocks lie near each other together. A block that several share
    comes once.

    Raises ValueError for a sequence that needs more slots than there are.
    """
    near = dict(sorted(uses.items(), key=lambda item: fmean(item[1].block_ids)))
    # the order decides how well they fill the slots
    uses = min((near, uses), key=lambda order: len(_groups(order, num_slots)))
    groups = _groups(uses, num_slots)
    if len(groups) > 1:  # even ones leave each other time
        longest = max(len(use.block_ids) for use in uses.values())
        share = -(-sum(len(slots) for _, slots in groups) // len(groups))
        even = _groups(uses, min(num_slots, max(longest, share)))
        groups = even if len(even) == len(groups) else groups
    return tuple(_micro_batch(uses, sorted(members)) for members, _ in groups)


def _groups(uses: Mapping[int, BlockUse], num_slots: int) -> list[tuple[list[int], set[int]]]:
    """Sequences with the blocks that they need together, in their order."""
    groups: list[tuple[list[int], set[int]]] = []
    for position, use in uses.items():
        if len(use.block_ids) > num_slots:
            raise ValueError(
                f"a sequence of {len(use.block_ids)} blocks cannot pass through {num_slots} slots"
            )
        if not groups or len(groups[-1][1].union(use.block_ids)) > num_slots:
            groups.append(([], set()))
        groups[-1][0].append(position)
        groups[-1][1].update(use.block_ids)
    return groups


def _micro_batch(uses: Mapping[int, BlockUse], members: Sequence[int]) -> MicroBatch:
    loaded: set[int] = set()
    written: dict[int, range] = {}
    for use in (uses[position] for position in members):
        loaded.update(use.block_ids[: use.num_loaded])
        written.update(use.written)
    last = {uses[p].block_ids[-1] for p in members if uses[p].is_unfinished}
    blocks = (*sorted(loaded), *sorted(written.keys() - loaded))
    slots = {block: slot for slot, block in enumerate(blocks)}
    return MicroBatch(
        members=tuple(members),
        blocks=blocks,
        num_loaded=len(loaded),
        written={slot: written[block] for slot, block in enumerate(blocks) if block in written},
        unfinished=frozenset(slots[block] for block in last),
    )
