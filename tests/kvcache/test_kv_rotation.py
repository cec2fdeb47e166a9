"""Blocks beyond the device: hypothesis drives passes against plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.arena import Arena
from kvcache.block_copy import BlockCopy
from kvcache.block_pool import CachedBlock
from kvcache.checksum import PieceChecksum
from kvcache.kv_rotation import KVRotation
from kvcache.kv_store import KVStore, layer_views
from kvcache.layout import STORAGE_DTYPES, KVLayerSpec, KVLayout
from kvcache.micro_batch import NUM_BUFFERS, BlockUse, deal
from kvcache.tier import Tier
from kvcache.transfer_stats import Link

LAYOUT = KVLayout(
    layers=tuple(
        KVLayerSpec(layer=layer, key_heads=2, key_dim=dim, value_heads=1, value_dim=4)
        for layer, dim in ((3, 8), (4, 520), (6, 3))
    ),
    block_size=2,
    dtype="float32",
)
DEVICE, HOST, NVME, SLOTS = 3, 4, 6, 5
TOTAL = DEVICE + HOST + NVME


@contextmanager
def rotation(
    folder: Path, num_tail_blocks: int = 0, storage_dtype: str = "auto"
) -> Iterator[tuple[KVStore, KVRotation]]:
    device = Arena(Tier.DEVICE, 1 << 22)
    host = Arena(Tier.HOST, 1 << 20)
    layout = replace(LAYOUT, storage_dtype=storage_dtype)
    store = KVStore(
        layout, device_arena=device, host_arena=host, num_device_blocks=DEVICE, num_host_blocks=2
    )
    rotating = KVRotation(
        store,
        num_host_blocks=HOST,
        num_nvme_blocks=NVME,
        num_slots=SLOTS,
        num_tail_blocks=num_tail_blocks,
        device_arena=device,
        host_arena=host,
        folder=folder / "kv",
    )
    store.extend(rotating)
    try:
        yield store, rotating
    finally:
        rotating.close()
        device.check_integrity()
        host.check_integrity()


def copy_of(source: Tier, source_id: int, target: Tier, target_id: int) -> BlockCopy:
    return BlockCopy(source=source, source_id=source_id, target=target, target_id=target_id)


uses = st.lists(
    st.tuples(
        st.lists(st.integers(0, TOTAL - 1), min_size=1, max_size=SLOTS, unique=True), st.booleans()
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    passes=st.lists(uses, min_size=1, max_size=8),
    num_tail_blocks=st.integers(0, 4),
    demoted=st.lists(st.integers(DEVICE, TOTAL - 1), max_size=3),
    storage_dtype=st.sampled_from(STORAGE_DTYPES),
)
def test_every_block_keeps_what_was_written(
    passes: list[list[tuple[list[int], bool]]],
    num_tail_blocks: int,
    demoted: list[int],
    storage_dtype: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each sequence reads all its blocks, and writes the last one whole; after each pass some
    blocks go down to the host and come up again."""
    known: dict[tuple[int, int], float] = {}
    stamp = 0.0
    folder = tmp_path_factory.mktemp("rotation")
    with rotation(folder, num_tail_blocks, storage_dtype) as (store, rotating):
        for sequences in passes:
            free = set(range(TOTAL))
            chosen = {}
            for index, (block_ids, unfinished) in enumerate(sequences):
                if set(block_ids) <= free:
                    free -= set(block_ids)
                    chosen[index] = BlockUse(
                        block_ids=tuple(block_ids),
                        num_loaded=len(block_ids),
                        first_written=len(block_ids) - 1,
                        unfinished=unfinished,
                    )
            micro_batches = deal(chosen, SLOTS)
            rotating.begin(micro_batches)
            for spec in LAYOUT.layers:
                for micro_batch in micro_batches:
                    keys, values = rotating.take(spec.layer)
                    for slot, block in enumerate(micro_batch.blocks):
                        value = torch.tensor(known.get((spec.layer, block), 0.0))
                        # one value fills a block: any storage dtype holds it, but for its scale
                        torch.testing.assert_close(keys[slot], value.expand_as(keys[slot]))
                        torch.testing.assert_close(values[slot], -value.expand_as(values[slot]))
                    for slot in micro_batch.written:
                        stamp += 1.0
                        keys[slot], values[slot] = stamp, -stamp
                        known[spec.layer, micro_batch.blocks[slot]] = stamp
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
            for num_loaded, unfinished in ((0, True), (1, True), (1, False)):
                use = BlockUse(
                    block_ids=(block,),
                    num_loaded=num_loaded,
                    first_written=0,
                    unfinished=unfinished,
                )
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


@pytest.mark.parametrize("storage_dtype", ["int8", "fp8"])
def test_a_storage_dtype_rounds_once(storage_dtype: str, tmp_path: Path) -> None:
    """Down to the host, to a rotating block and back: the same as down to the host alone."""
    error = {"int8": 0.5 / 127, "fp8": 2.0**-4}[storage_dtype]
    with rotation(tmp_path, 0, storage_dtype) as (store, _):
        for spec in LAYOUT.layers:
            for view in store.layer(spec.layer):
                view.copy_(torch.randn(view.shape))
        before = store.device_rows[0].clone()
        assert store._blocks[Tier.HOST].shape[1] < 0.3 * LAYOUT.block_bytes
        store.copy([copy_of(Tier.DEVICE, 0, Tier.HOST, 0)])
        stored = store._blocks[Tier.HOST][0].clone()
        store.copy([copy_of(Tier.HOST, 0, Tier.DEVICE, 1)])
        once = store.device_rows[1].clone()
        for block in (DEVICE + 1, DEVICE + HOST + 1):
            store.copy([copy_of(Tier.HOST, 0, Tier.DEVICE, block)])
            store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, 1)])
            assert torch.equal(store._blocks[Tier.HOST][1], stored)
            store.copy([copy_of(Tier.DEVICE, block, Tier.DEVICE, 2)])
            assert torch.equal(store.device_rows[2], once)
            store.copy([copy_of(Tier.DEVICE, 0, Tier.DEVICE, block)])
            store.copy([copy_of(Tier.DEVICE, block, Tier.DEVICE, 2)])
            assert torch.equal(store.device_rows[2], once)
        for index, spec in enumerate(LAYOUT.layers):
            rows = torch.stack([before, once])
            for half in layer_views(rows, LAYOUT.piece(index), LAYOUT, index):
                scale = half[0].abs().amax((0, 2), keepdim=True)
                assert ((half[0] - half[1]).abs() <= error * scale * 1.001).all(), spec


def test_a_flipped_bit_on_disk_is_found(tmp_path: Path) -> None:
    block = DEVICE + HOST + 2
    use = {0: BlockUse(block_ids=(block,), num_loaded=1, first_written=0)}
    micro_batches = deal(use, SLOTS)
    with rotation(tmp_path) as (store, rotating):
        rotating.begin(micro_batches)
        for spec in LAYOUT.layers:
            rotating.take(spec.layer)[0].fill_(1.0)
            rotating.put_back()
        rotating.end()
        assert rotating.take_lost() == ()
        assert rotating._file is not None
        file, offset = rotating._file._file, rotating._file._offset(1, 2)
        page = Arena(Tier.HOST, 4096).allocate(4096)
        rotating._file._backend.read(file, offset, page)
        page[17] ^= 4
        rotating._file._backend.write(file, offset, page)
        rotating.begin(micro_batches)
        for spec in LAYOUT.layers:
            keys, _ = rotating.take(spec.layer)
            assert (keys[0] == (0.0 if spec.layer == 4 else 1.0)).all()
            rotating.put_back()
        rotating.end()
        lost = CachedBlock(Tier.DEVICE, block)
        assert rotating.take_lost() == (lost,)
        assert rotating.take_lost() == ()
        store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, 1)])
        assert rotating.take_lost() == (), "what was written since is whole"
        rotating._file._backend.write(file, offset, page)
        store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, 1)])
        assert set(rotating.take_lost()) == {lost, CachedBlock(Tier.HOST, 1)}


def test_the_buffers_are_counted(tmp_path: Path) -> None:
    with rotation(tmp_path) as (_, rotating):
        stride = max(rotating._strides)
        assert stride % 4096 == 0 and stride > 2 * (2 * 520 + 4) * 4
        assert len(rotating._buffers) == NUM_BUFFERS
        assert all(buffer.nbytes == SLOTS * stride for buffer in rotating._buffers)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "kv").iterdir()) == []


@given(
    seed=st.integers(0, 1 << 32),
    bits=st.sets(st.integers(0, 1024 * 8 - 1), min_size=1, max_size=3),
    rows=st.integers(1, 3),
)
def test_changed_bits_change_the_checksum(seed: int, bits: set[int], rows: int) -> None:
    checksum = PieceChecksum(1024)
    generator = torch.Generator().manual_seed(seed)
    pieces = torch.randint(0, 256, (rows, 1024), dtype=torch.uint8, generator=generator)
    before = checksum.of(pieces)
    assert before.shape == (rows,)
    for bit in bits:
        pieces[rows - 1, bit // 8] ^= 1 << bit % 8
    after = checksum.of(pieces)
    assert torch.equal(before[:-1], after[:-1]) and before[-1] != after[-1]


def test_sectors_and_words_in_another_order_have_another_checksum() -> None:
    piece = torch.randint(0, 256, (1, 8, 64, 8), dtype=torch.uint8)
    checksum = PieceChecksum(piece.numel())
    known = checksum.of(piece.view(1, -1))
    for other in (piece.flip(1), piece.flip(2), piece.roll(1, 1), piece.roll(1, 2)):
        assert checksum.of(other.contiguous().view(1, -1)) != known
