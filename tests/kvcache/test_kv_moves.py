"""What a micro-batch reads and writes on NVMe, by exact slots."""

from __future__ import annotations

import torch

from kvcache.kv_moves import KVMoves, TransferLimits, moves_of
from kvcache.micro_batch import MicroBatch

SIZE = 4


def moves(
    *blocks: int, new: int = 0, tails: tuple[int, ...] = (), most: int = 8, gap: int = 2
) -> KVMoves:
    """Of ``blocks``, all on NVMe, of which the last ``new`` take their first tokens; those at the
    slots ``tails`` come from tail rows."""
    loaded = len(blocks) - new
    return moves_of(
        MicroBatch(
            members=(),
            blocks=blocks,
            num_loaded=loaded,
            written={slot: range(SIZE) for slot in range(loaded, len(blocks))},
        ),
        first_host=0,
        first_nvme=0,
        tails={slot: row for row, slot in enumerate(tails)},
        kept={},
        block_size=SIZE,
        device=torch.device("cpu"),
        limits=TransferLimits(most, gap),
    )


def test_runs_with_small_gaps_are_read_at_once() -> None:
    assert moves(1, 2, 5, 9, 10).reads == ((slice(0, 2), slice(2, 3)), (slice(3, 5),))
    assert moves(1, 2, 5, 9, 10, gap=0).reads == ((slice(0, 2),), (slice(2, 3),), (slice(3, 5),))
    assert moves().reads == ()


def test_a_read_is_not_longer_than_it_may_be() -> None:
    assert moves(*range(7), most=3).reads == ((slice(0, 3),), (slice(3, 6),), (slice(6, 7),))
    apart = (slice(0, 1), slice(1, 2)), (slice(2, 4),)
    assert moves(1, 3, 5, 6, most=5).reads == apart
    assert moves(1, 3, 5, 6, most=6).reads == ((*apart[0], *apart[1]),)


def test_no_more_is_read_for_nothing_than_is_wanted() -> None:
    assert moves(1, 4, 7).reads == ((slice(0, 1), slice(1, 2)), (slice(2, 3),))


def test_what_lies_in_tail_rows_is_not_read() -> None:
    found = moves(1, 2, 3, 4, tails=(1, 3))
    assert found.reads == ((slice(0, 1), slice(2, 3)),)
    assert found.wanted.tolist() == [True, False, True, False]
    assert moves(1, 2, tails=(0, 1)).reads == ()


def test_scattered_writes_go_together() -> None:
    found = moves(1, 7, 8, 20, 30, new=4)
    assert found.writes == ((slice(1, 3), slice(3, 4), slice(4, 5)),)
    assert moves(1, 7, 8, 20, 30, new=4, most=3).writes == (
        (slice(1, 3), slice(3, 4)),
        (slice(4, 5),),
    )


def test_a_write_has_no_more_runs_than_one_thread_should_take() -> None:
    found = moves(*range(0, 80, 2), new=40, most=100)
    assert [len(runs) for runs in found.writes] == [32, 8]
