"""Byte counts, refusals and the return of memory to the operating system."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.arena import Arena
from kvcache.errors import CorruptUnitError, StorageError, TierFullError
from kvcache.tier import Tier


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_counts_pages_and_refuses_past_the_capacity() -> None:
    arena = Arena(Tier.HOST, 3 * 4096)
    first = arena.allocate(4097)
    assert (arena.used_bytes, arena.free_bytes, first.numel()) == (8192, 4096, 4097)
    with pytest.raises(TierFullError) as caught:
        arena.allocate(4097)
    error = caught.value
    assert (error.tier, error.asked, error.free, error.capacity) == (Tier.HOST, 8192, 4096, 12288)
    assert "host tier" in str(error) and "8192" in str(error) and "12288" in str(error)
    arena.allocate(4096)
    arena.release(first)
    assert (arena.used_bytes, arena.peak_bytes) == (4096, 12288)
    arena.check_integrity()
    arena.close()
    arena.close()
    assert arena.used_bytes == 0


def test_one_piece_is_counted_by_two() -> None:
    first, second = Arena(Tier.DEVICE, 3 * 4096), Arena(Tier.HOST, 2 * 4096)
    both = first.allocate_with(4097, second, 5000)
    both.fill_(1)
    assert both.numel() == 9097
    assert (first.used_bytes, second.used_bytes) == (8192, 8192)
    with pytest.raises(TierFullError) as caught:
        first.allocate_with(1, second, 1)
    assert caught.value.tier is Tier.HOST
    assert (first.used_bytes, second.used_bytes) == (8192, 8192)
    assert both.all()
    for arena in (first, second):
        arena.check_integrity()
        arena.close()
        assert arena.used_bytes == 0
    assert not both.any()


def test_memory_is_aligned_zeroed_and_empty_allocations_are_free() -> None:
    arena = Arena(Tier.DEVICE, 1 << 20, torch.device("cpu"))
    tensor = arena.allocate(10_000)
    assert tensor.data_ptr() % 4096 == 0 and not tensor.any()
    empty = arena.allocate(0)
    arena.release(empty)
    assert arena.used_bytes == 12288


def test_release_returns_memory_even_while_a_view_lives() -> None:
    arena = Arena(Tier.DEVICE, 256 << 20)
    before = resident_bytes()
    tensor = arena.allocate(128 << 20)
    tensor.fill_(1)
    view = tensor[-4096:]
    assert resident_bytes() - before > 100 << 20
    arena.release(tensor)
    assert resident_bytes() - before < 32 << 20
    assert not view.any()


@pytest.mark.parametrize(
    ("num_bytes", "alignment"), [(-1, 4096), (16, 0), (16, -2), (16, 8192), (16, 100)]
)
def test_bad_requests_are_refused(num_bytes: int, alignment: int) -> None:
    with pytest.raises(ValueError):
        Arena(Tier.HOST, 1 << 20).allocate(num_bytes, alignment)


def test_foreign_and_double_releases_are_refused() -> None:
    arena = Arena(Tier.HOST, 1 << 20)
    tensor = arena.allocate(4096)
    with pytest.raises(ValueError):
        arena.release(torch.zeros(4096, dtype=torch.uint8))
    arena.release(tensor)
    with pytest.raises(ValueError):
        arena.release(tensor)
    with pytest.raises(ValueError):
        Arena(Tier.NVME, 1 << 20)
    with pytest.raises(ValueError):
        Arena(Tier.HOST, -1)


@given(st.lists(st.integers(1, 20_000), max_size=30), st.randoms(use_true_random=False))
def test_counters_follow_any_sequence(sizes: list[int], dice: object) -> None:
    arena = Arena(Tier.HOST, 64 * 4096)
    held: list[torch.Tensor] = []
    expected = 0
    for size in sizes:
        pages = -(-size // 4096) * 4096
        if expected + pages <= arena.capacity_bytes:
            held.append(arena.allocate(size))
            expected += pages
        else:
            with pytest.raises(TierFullError):
                arena.allocate(size)
            expected -= -(-held[0].numel() // 4096) * 4096
            arena.release(held.pop(0))
        assert arena.used_bytes == expected
        arena.check_integrity()


@pytest.mark.parametrize(
    "error",
    [
        TierFullError(Tier.DEVICE, 1, 2, 3),
        StorageError("/a", 4096, "why"),
        CorruptUnitError("u", "/a"),
    ],
)
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_arenas() -> None:
    device = Arena(Tier.DEVICE, 1 << 20, torch.device("cuda"))
    host = Arena(Tier.HOST, 1 << 20)
    pinned = host.allocate(4096)
    assert device.allocate(4096).is_cuda and pinned.is_pinned()
    host.release(pinned)
    device.close()
