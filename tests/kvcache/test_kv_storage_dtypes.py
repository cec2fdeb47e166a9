"""KV that lies below the device in a smaller dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from giantserve.models.batch import ChunkSpec
from giantserve.models.pass_kv import PassKV
from kvcache.kv_store import layer_views
from kvcache.tier import Tier
from tests.kvcache.rotations import (
    DEVICE,
    HOST,
    LAYOUT,
    SIZE,
    TOTAL,
    Step,
    copy_of,
    rotation,
    run_pass,
)


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
