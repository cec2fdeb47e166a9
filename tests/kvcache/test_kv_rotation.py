"""Blocks beyond the device: hypothesis drives passes against plain tensors."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from giantserve.models.batch import ChunkSpec
from giantserve.models.pass_kv import PassKV
from kvcache import kept_index, kv_file
from kvcache.arena import Arena
from kvcache.block_copy import BlockCopy
from kvcache.block_pool import CachedBlock
from kvcache.checksum import checksums
from kvcache.errors import StorageError
from kvcache.kv_rotation import KVRotation
from kvcache.kv_store import KVStore, layer_views
from kvcache.layout import STORAGE_DTYPES, KVLayerSpec, KVLayout
from kvcache.micro_batch import NUM_BUFFERS, BlockUse, deal
from kvcache.storage import DirectFile
from kvcache.tier import Tier
from kvcache.transfer_stats import Link

LAYOUT = KVLayout(
    layers=tuple(
        KVLayerSpec(layer=layer, key_heads=2, key_dim=dim, value_heads=1, value_dim=4)
        for layer, dim in ((3, 8), (4, 520), (6, 3))
    ),
    block_size=4,
    dtype="float32",
)
SIZE = LAYOUT.block_size
DEVICE, HOST, NVME, SLOTS = 3, 4, 6, 5
TOTAL = DEVICE + HOST + NVME


@contextmanager
def rotation(
    folder: Path,
    num_tail_blocks: int = 0,
    storage_dtype: str = "auto",
    kept_as: str | None = None,
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
        kept_as=kept_as,
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


class Step(NamedTuple):
    """What one sequence does in a pass: it adds ``added`` tokens, the last of which leaves ``room``
    in the last of ``block_ids``; or as many as there is place for."""

    block_ids: tuple[int, ...]
    added: int
    room: int

    @property
    def use(self) -> BlockUse:
        end = len(self.block_ids) * SIZE - self.room
        tokens = range(max(0, end - self.added), end)
        return BlockUse(block_ids=self.block_ids, tokens=tokens, block_size=SIZE)


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
            rotating._read_blocks, rotating._gap_blocks = limits
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


@pytest.mark.parametrize("storage_dtype", ["int8", "fp8"])
def test_what_is_no_number_stays_none(storage_dtype: str, tmp_path: Path) -> None:
    with rotation(tmp_path, 0, storage_dtype) as (store, _):
        keys, _ = store.layer(LAYOUT.layers[0].layer)
        keys[0].fill_(1.0)
        keys[0].flatten()[0] = torch.nan
        keys[1].fill_(1.0)
        for block in (0, 1):
            store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, block)])
            store.copy([copy_of(Tier.HOST, block, Tier.DEVICE, block)])
        assert keys[0].isnan().any()
        assert (keys[1] == 1.0).all()


def run_pass(rotating: KVRotation, steps: Sequence[tuple[Step, float]]) -> dict[int, set[float]]:
    """Each sequence adds tokens of one value. Returns, by block, what it held in its first place
    before."""
    held: dict[int, set[float]] = {}
    uses = {index: step.use for index, (step, _) in enumerate(steps)}
    values = {block: value for step, value in steps for block in step.block_ids}
    (micro_batch,) = deal(uses, SLOTS)
    rotating.begin([micro_batch])
    for spec in LAYOUT.layers:
        views = rotating.take(spec.layer)
        for slot, block in enumerate(micro_batch.blocks[: micro_batch.num_loaded]):
            for view in views:
                held.setdefault(block, set()).update(view[slot, 0].flatten().tolist())
        for slot, places in micro_batch.written.items():
            for view in views:
                view[slot, places.start : places.stop] = values[micro_batch.blocks[slot]]
        rotating.put_back()
    rotating.end()
    return held


def test_what_a_tail_row_held_before_does_not_coarsen_a_block(tmp_path: Path) -> None:
    first, second = DEVICE + HOST, DEVICE + HOST + 1
    with rotation(tmp_path, num_tail_blocks=1, storage_dtype="int8") as (store, rotating):
        for room in range(SIZE - 1, -1, -1):
            run_pass(rotating, [(Step((first,), added=1, room=room), 1e6)])
        run_pass(rotating, [(Step((second,), added=1, room=SIZE - 1), 1.0)])
        store.copy([copy_of(Tier.DEVICE, second, Tier.HOST, 0)])
        store.copy([copy_of(Tier.HOST, 0, Tier.DEVICE, second)])
        held = run_pass(rotating, [(Step((second,), added=1, room=SIZE - 2), 1.0)])
        assert held == {second: {1.0}}


@pytest.mark.parametrize("leaves", ["evicted", "copied"])
def test_a_tail_row_of_an_ended_sequence_does_not_coarsen_the_next(
    leaves: str, tmp_path: Path
) -> None:
    """The first sequence ends within its block, which then is another's."""
    block, other = DEVICE + HOST, DEVICE + HOST + 1
    with rotation(tmp_path, num_tail_blocks=1, storage_dtype="int8") as (store, rotating):
        run_pass(rotating, [(Step((block,), added=SIZE - 1, room=1), 1e6)])
        run_pass(rotating, [(Step((block,), added=1, room=SIZE - 1), 1.0)])
        if leaves == "evicted":
            run_pass(rotating, [(Step((other,), added=1, room=SIZE - 1), 1.0)])
        else:
            store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, 0)])
            store.copy([copy_of(Tier.HOST, 0, Tier.DEVICE, block)])
        held = run_pass(rotating, [(Step((block,), added=1, room=SIZE - 2), 1.0)])
        assert held == {block: {1.0}}


@pytest.mark.parametrize("target", [Tier.HOST, Tier.DEVICE], ids=["host", "rotating"])
def test_what_a_device_block_held_before_does_not_coarsen_a_new_one(
    target: Tier, tmp_path: Path
) -> None:
    with rotation(tmp_path, 0, "int8") as (store, _):
        spec = ChunkSpec(seq_id=1, start=0, length=1, block_ids=[1])
        views = [view for layer in LAYOUT.layers for view in store.layer(layer.layer)]
        for view in views:
            view.fill_(1e6)
        PassKV(store, None, [spec], SIZE, torch.device("cpu"))
        for view in views:
            view[1, 0] = 1.0
        below = 0 if target is Tier.HOST else DEVICE
        store.copy([copy_of(Tier.DEVICE, 1, target, below)])
        store.copy([copy_of(target, below, Tier.DEVICE, 2)])
        for view in views:
            assert (view[2, 0] == 1.0).all()
            assert (view[0] == 1e6).all()


def test_what_a_buffer_held_before_does_not_coarsen_a_new_block(tmp_path: Path) -> None:
    """It lies between two blocks that wait in tail rows, so that nothing is read at all."""
    *large, low, new, high = range(DEVICE + HOST, TOTAL)
    with rotation(tmp_path, num_tail_blocks=2, storage_dtype="int8") as (_, rotating):
        run_pass(rotating, [(Step(tuple(large), added=SIZE * len(large), room=0), 1e6)])
        both = [(Step((block,), added=1, room=SIZE - 1), 1.0) for block in (low, high)]
        run_pass(rotating, both)
        run_pass(rotating, [(Step(tuple(large), added=1, room=0), 1e6)])
        both = [(Step((block,), added=1, room=SIZE - 2), 1.0) for block in (low, high)]
        run_pass(rotating, [*both, (Step((new,), added=1, room=SIZE - 1), 1.0)])
        held = run_pass(rotating, [(Step((new,), added=1, room=SIZE - 2), 1.0)])
        assert held == {new: {1.0}}
        assert rotating.take_lost() == ()


def test_a_flipped_bit_on_disk_is_found(tmp_path: Path) -> None:
    block = DEVICE + HOST + 2
    whole = Step((block,), added=SIZE, room=0).use
    last = Step((block,), added=1, room=0).use
    with rotation(tmp_path) as (store, rotating):
        rotating.begin(deal({0: whole}, SLOTS))
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
        rotating.begin(deal({0: last}, SLOTS))
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


@pytest.mark.parametrize("fault", ["read", "write"])
def test_a_bad_page_costs_the_block_that_it_is_of(tmp_path: Path, fault: str) -> None:
    """The last page of the file is that of the last block at the last layer; its neighbours are
    moved in one transfer with it."""
    blocks = tuple(range(TOTAL - 3, TOTAL))
    bad = CachedBlock(Tier.DEVICE, blocks[-1])
    with rotation(tmp_path) as (_, rotating):
        assert rotating._file is not None
        end = rotating.nvme_bytes - 4096
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if fault == "write":  # EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (end, before[1]))
        try:
            run_pass(rotating, [(Step(blocks, added=SIZE * len(blocks), room=0), 1.0)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert rotating.take_lost() == ((bad,) if fault == "write" else ())
        if fault == "read":  # which then is a short one
            os.ftruncate(rotating._file._file.descriptor, end)
        held = run_pass(rotating, [(Step(blocks, added=1, room=0), 1.0)])
        assert rotating.take_lost() == (bad,)
        assert all(held[block] == {1.0} for block in blocks[:-1])


@contextmanager
def bad_page(monkeypatch: pytest.MonkeyPatch, name: str, offset: int) -> Iterator[list[int]]:
    """Calls of ``os.<name>`` that touch the page at ``offset`` fail; yields how many parts all
    calls had."""
    call, parts = getattr(os, name), []

    def failing(descriptor: int, views: Sequence[memoryview], start: int) -> int:
        parts.append(len(views))
        if start <= offset < start + sum(map(len, views)):
            raise OSError(errno.EIO, "bad page")
        return int(call(descriptor, views, start))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        yield parts


def test_a_bad_page_between_blocks_costs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads across it fail; from then on none goes across anything."""
    one, bad, other, third, fourth = range(DEVICE + HOST, DEVICE + HOST + 5)
    with rotation(tmp_path) as (_, rotating):
        for block in (one, bad, other, third, fourth):
            run_pass(rotating, [(Step((block,), added=SIZE, room=0), float(block))])
        assert rotating._file is not None
        step = Step((one, other, fourth), added=1, room=0)
        with bad_page(monkeypatch, "preadv", rotating._file._offset(1, bad - one)) as parts:
            assert run_pass(rotating, [(step, 0.0)]) == {
                one: {float(one)},
                other: {float(other)},
                fourth: {float(fourth)},
            }
            assert max(parts) == 5
            parts.clear()
            assert set(run_pass(rotating, [(step, 0.0)])) == {one, other, fourth}
            assert set(parts) == {1}
        assert rotating.take_lost() == ()
        assert caplog.text.count("no longer take along") == 1


def test_a_bad_page_among_scattered_writes_costs_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = tuple(range(DEVICE + HOST, TOTAL, 2))
    with rotation(tmp_path) as (_, rotating):
        assert rotating._file is not None
        with bad_page(monkeypatch, "pwritev", rotating._file._offset(2, 2)):
            run_pass(rotating, [(Step(blocks, added=SIZE * len(blocks), room=0), 1.0)])
        assert rotating.take_lost() == (CachedBlock(Tier.DEVICE, blocks[1]),)
        held = run_pass(rotating, [(Step(blocks, added=1, room=0), 1.0)])
        assert held[blocks[0]] == held[blocks[2]] == {1.0}


def test_an_index_comes_and_goes_with_what_is_kept(tmp_path: Path) -> None:
    first, index = DEVICE + HOST, tmp_path / "kv" / "name.index"
    with rotation(tmp_path, kept_as="name") as (_, rotating):
        rotating.keep({first + 2: bytes(32)})
        assert index.exists()
    with rotation(tmp_path, kept_as="name") as (_, rotating):
        assert rotating.kept == {first + 2: bytes(32)}
        rotating.keep({})
        rotating.keep({})
        assert not index.exists()
    with rotation(tmp_path, kept_as="name") as (_, rotating):
        assert rotating.kept == {}


def test_a_disk_that_takes_no_index_keeps_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"begun")
        raise SafetensorError("no space left")

    with rotation(tmp_path, kept_as="name") as (_, rotating):
        monkeypatch.setattr(kept_index, "save_file", save)
        rotating.keep({DEVICE + HOST: bytes(32)})
        assert "cached prefixes are not kept: no space left" in caplog.text
        assert [path.name for path in (tmp_path / "kv").iterdir()] == ["name.kv"]
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "kv")
        rotating.keep({DEVICE + HOST: bytes(32)})
        assert caplog.text.count("cached prefixes are not kept") == 2


def test_a_disk_without_room_is_left_as_free_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rotation(tmp_path, kept_as="name") as (_, rotating):
        rotating.keep({DEVICE + HOST: bytes(32)})

    def claim(file: DirectFile, num_bytes: int) -> None:
        os.posix_fallocate(file.descriptor, 0, 2 * num_bytes)
        raise StorageError(str(file.path), 0, "the disk is full")

    monkeypatch.setattr(kv_file, "reserve", claim)
    with pytest.raises(StorageError), rotation(tmp_path, kept_as="name"):
        pass
    (left,) = (tmp_path / "kv").iterdir()
    assert (left.name, left.stat().st_size, left.stat().st_blocks) == ("name.kv", 0, 0)


def test_the_buffers_are_counted(tmp_path: Path) -> None:
    with rotation(tmp_path) as (_, rotating):
        stride = max(rotating._strides)
        assert stride % 4096 == 0 and stride > SIZE * (2 * 520 + 4) * 4
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
    generator = torch.Generator().manual_seed(seed)
    pieces = torch.randint(0, 256, (rows, 1024), dtype=torch.uint8, generator=generator)
    before = checksums(pieces)
    assert before.shape == (rows,)
    for bit in bits:
        pieces[rows - 1, bit // 8] ^= 1 << bit % 8
    after = checksums(pieces)
    assert torch.equal(before[:-1], after[:-1]) and before[-1] != after[-1]
