"""Which blocks come to the device together, by exact slots."""

from __future__ import annotations

import pytest

from kvcache.micro_batch import BlockUse, MicroBatch, deal

SIZE = 4
LAST = range(SIZE - 1, SIZE)


def decode(*block_ids: int) -> BlockUse:
    """A sequence whose new token fills its last block."""
    return use(block_ids, range(SIZE * len(block_ids) - 1, SIZE * len(block_ids)))


def use(block_ids: tuple[int, ...], tokens: range) -> BlockUse:
    return BlockUse(block_ids=block_ids, tokens=tokens, block_size=SIZE)


def test_sequences_share_a_micro_batch_while_their_blocks_fit() -> None:
    uses = {0: decode(5, 4), 2: decode(3), 3: decode(9, 8), 7: decode(6)}
    assert deal(uses, 3) == (
        MicroBatch(members=(0, 2), blocks=(3, 4, 5), num_loaded=3, written={0: LAST, 1: LAST}),
        MicroBatch(members=(3, 7), blocks=(6, 8, 9), num_loaded=3, written={0: LAST, 1: LAST}),
    )
    assert [m.members for m in deal(uses, 2)] == [(2,), (0,), (7,), (3,)]
    assert deal({}, 3) == ()


def test_micro_batches_are_even() -> None:
    uses = {number: decode(2 * number, 2 * number + 1) for number in range(8)}
    assert [len(m.members) for m in deal(uses, 12)] == [4, 4]
    assert [len(m.members) for m in deal(uses, 16)] == [8]
    assert [len(m.members) for m in deal(uses, 6)] == [3, 3, 2]


def test_a_shared_block_comes_once() -> None:
    (together,) = deal({0: decode(1, 2, 7), 1: decode(1, 2, 5)}, 4)
    assert together.blocks == (1, 2, 5, 7)
    assert together.written == {2: LAST, 3: LAST}
    assert together.slots == {1: 0, 2: 1, 5: 2, 7: 3}


def test_a_block_with_room_left_is_unfinished() -> None:
    full, open_ = decode(1, 2), use((7, 5), range(5, 7))
    (together,) = deal({0: full, 1: open_}, 4)
    assert together.blocks == (1, 2, 5, 7)
    assert together.written == {1: LAST, 2: range(1, 3)} and together.unfinished == {2}


def test_blocks_that_hold_nothing_yet_are_not_loaded() -> None:
    # 3 blocks of a prompt: the first is full, the second half full, the third and fourth new
    prompt = use((4, 9, 2, 7), range(6, 15))
    (alone,) = deal({0: prompt}, 4)
    assert alone == MicroBatch(
        members=(0,),
        blocks=(4, 9, 2, 7),
        num_loaded=2,
        written={1: range(2, 4), 2: range(4), 3: range(3)},
        unfinished=frozenset({3}),
    )


def test_sequences_whose_blocks_are_near_come_together() -> None:
    uses = {0: decode(1, 2), 1: decode(21, 22), 2: decode(3, 4), 3: decode(23, 20)}
    assert [m.members for m in deal(uses, 4)] == [(0, 2), (1, 3)]


def test_nearness_costs_no_micro_batch() -> None:
    uses = {0: decode(1, 2, 3), 1: decode(20), 2: decode(10, 11, 12), 3: decode(21)}
    assert [m.members for m in deal(uses, 4)] == [(0, 1), (2, 3)]


def test_a_sequence_longer_than_the_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="3 blocks cannot pass through 2 slots"):
        deal({0: decode(1, 2, 3)}, 2)
