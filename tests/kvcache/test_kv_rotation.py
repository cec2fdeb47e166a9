"""Blocks beyond the device: hypothesis drives passes against plain tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.kv_moves import TransferLimits
from kvcache.layout import STORAGE_DTYPES
from kvcache.micro_batch import NUM_BUFFERS, BlockUse, deal
from kvcache.tier import Tier
from kvcache.transfer_stats import Link
from tests.kvcache.rotations import (
    DEVICE,
    HOST,
    LAYOUT,
    SIZE,
    SLOTS,
    TOTAL,
    Step,
    copy_of,
    rotation,
)

steps = st.lists(
    st.builds(
        Step,
        st.lists(st.integers(0, TOTAL - 1), min_size=1, max_size=SLOTS, unique=True).map(tuple),
        st.integers(1, 2 * SIZE),
        st.integers(0, SIZE - 1),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    passes=st.lists(steps, min_size=1, max_size=8),
    num_tail_blocks=st.integers(0, 4),
    demoted=st.lists(st.integers(DEVICE, TOTAL - 1), max_size=3),
    storage_dtype=st.sampled_from(STORAGE_DTYPES),
    limits=st.tuples(st.integers(1, 6), st.integers(0, 3)),
    seed=st.integers(0, 1 << 32),
)
def test_every_block_keeps_what_was_written(
    passes: list[list[Step]],
    num_tail_blocks: int,
    demoted: list[int],
    storage_dtype: str,
    limits: tuple[int, int],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each sequence reads its blocks and adds its tokens; after each pass some blocks go down to
    the host and come up again. Elements of a block are of one size, which any storage dtype holds,
    unless something else weighs in. What lies past a sequence's last token is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    known = {
        (spec.layer, block, place): (torch.ones(()), torch.ones(()))
        for spec in LAYOUT.layers
        for block in range(TOTAL)
        for place in range(SIZE)
    }
    sizes = dict.fromkeys(range(TOTAL), 1.0)
    folder = tmp_path_factory.mktemp("rotation")
    with rotation(folder, num_tail_blocks, storage_dtype) as (store, rotating):
        for view in (view for spec in LAYOUT.layers for view in store.layer(spec.layer)):
            view.fill_(1.0)
        for block in range(1, TOTAL):
            store.copy([copy_of(Tier.DEVICE, 0, Tier.DEVICE, block)])
        for steps in passes:
            free = set(range(TOTAL))
            chosen = {}
            for index, step in enumerate(steps):
                if set(step.block_ids) <= free:
                    free -= set(step.block_ids)
                    chosen[index] = step.use
            micro_batches = deal(chosen, SLOTS)
            for micro_batch in micro_batches:
                for slot, places in micro_batch.written.items():
                    if places.start == 0:
                        size = torch.randint(0, 3, (), generator=generator).item()
                        sizes[micro_batch.blocks[slot]] = 1000.0**size
            assert rotating._nvme is not None
            rotating._nvme.limits = TransferLimits(*limits)
            rotating.begin(micro_batches)
            for spec in LAYOUT.layers:
                for micro_batch in micro_batches:
                    views = rotating.take(spec.layer)
                    for slot, block in enumerate(micro_batch.blocks[: micro_batch.num_loaded]):
                        for place in range(SIZE):
                            found = known.get((spec.layer, block, place), ())
                            for view, value in zip(views, found, strict=False):
                                there = view[slot, place]
                                torch.testing.assert_close(there, value.expand_as(there))
                    for slot, places in micro_batch.written.items():
                        block = micro_batch.blocks[slot]
                        for place in range(places.stop, SIZE):
                            known.pop((spec.layer, block, place), None)
                        for place in places:
                            token = tuple(
                                (torch.randint(0, 2, view.shape[2:], generator=generator) * 2 - 1)
                                * sizes[block]
                                for view in views
                            )
                            known[spec.layer, block, place] = token
                            for view, value in zip(views, token, strict=True):
                                view[slot, place] = value
                    rotating.put_back()
            rotating.end()
            tails = rotating._tails
            assert len(tails._held) + len(tails._free) == num_tail_blocks
            assert min(tails._held, default=DEVICE + HOST) >= DEVICE + HOST
            for block in demoted:
                store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, 0)])
                store.copy([copy_of(Tier.HOST, 0, Tier.DEVICE, block)])
        assert rotating.take_lost() == ()


def test_a_block_reaches_the_disk_once_it_is_full(tmp_path: Path) -> None:
    block = DEVICE + HOST + 1
    strides = sum(-(-LAYOUT.piece(index).num_bytes // 4096) * 4096 for index in range(3))
    to_nvme, from_nvme = Link("kv", Tier.DEVICE, Tier.NVME), Link("kv", Tier.NVME, Tier.DEVICE)
    for num_tail_blocks, moved in ((0, (3 * strides, 2 * strides)), (1, (strides, 0))):
        with rotation(tmp_path, num_tail_blocks) as (_, rotating):
            for tokens in (range(1), range(1, 3), range(3, SIZE)):
                use = BlockUse(block_ids=(block,), tokens=tokens, block_size=SIZE)
                rotating.begin(deal({0: use}, SLOTS))
                for spec in LAYOUT.layers:
                    rotating.take(spec.layer)
                    rotating.put_back()
                rotating.end()
            totals = rotating.transfers.snapshot()
            counted = [
                totals[link].num_bytes if link in totals else 0 for link in (to_nvme, from_nvme)
            ]
            assert tuple(counted) == moved
            assert not rotating._tails._held


def test_whole_blocks_go_down_and_come_up_again(tmp_path: Path) -> None:
    with rotation(tmp_path) as (store, _):
        for block in (1, DEVICE + 1, DEVICE + HOST + 3):
            row = torch.randint(0, 255, (LAYOUT.block_bytes,), dtype=torch.uint8)
            store._blocks[Tier.HOST][0] = row
            store.copy([copy_of(Tier.HOST, 0, Tier.DEVICE, block)])
            store._blocks[Tier.HOST][0] = 0
            store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, 1)])
            assert torch.equal(store._blocks[Tier.HOST][1], row)


def test_the_buffers_are_counted(tmp_path: Path) -> None:
    with rotation(tmp_path) as (_, rotating):
        stride = max(rotating._strides)
        assert stride % 4096 == 0 and stride > SIZE * (2 * 520 + 4) * 4
        assert len(rotating._buffers) == NUM_BUFFERS
        assert all(buffer.nbytes == SLOTS * stride for buffer in rotating._buffers)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "kv").iterdir()) == []
