"""What becomes of pieces on NVMe when the disk fails, and what is kept of them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from kvcache import kept_index, kv_file
from kvcache.arena import Arena
from kvcache.block_pool import CachedBlock
from kvcache.checksum import checksums
from kvcache.errors import StorageError
from kvcache.micro_batch import deal
from kvcache.storage import DirectFile
from kvcache.tier import Tier
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
    run_pass,
)


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
        assert rotating._nvme is not None
        file, offset = rotating._nvme._file._file, rotating._nvme._file._offset(1, 2)
        page = Arena(Tier.HOST, 4096).allocate(4096)
        rotating._nvme._file._backend.read(file, offset, page)
        page[17] ^= 4
        rotating._nvme._file._backend.write(file, offset, page)
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
        rotating._nvme._file._backend.write(file, offset, page)
        store.copy([copy_of(Tier.DEVICE, block, Tier.HOST, 1)])
        assert set(rotating.take_lost()) == {lost, CachedBlock(Tier.HOST, 1)}


@pytest.mark.parametrize("fault", ["read", "write"])
def test_a_bad_page_costs_the_block_that_it_is_of(tmp_path: Path, fault: str) -> None:
    """The last page of the file is that of the last block at the last layer; its neighbours are
    moved in one transfer with it."""
    blocks = tuple(range(TOTAL - 3, TOTAL))
    bad = CachedBlock(Tier.DEVICE, blocks[-1])
    with rotation(tmp_path) as (_, rotating):
        assert rotating._nvme is not None
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
            os.ftruncate(rotating._nvme._file._file.descriptor, end)
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
        assert rotating._nvme is not None
        step = Step((one, other, fourth), added=1, room=0)
        with bad_page(monkeypatch, "preadv", rotating._nvme._file._offset(1, bad - one)) as parts:
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
        assert rotating._nvme is not None
        with bad_page(monkeypatch, "pwritev", rotating._nvme._file._offset(2, 2)):
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
