"""Rows of tables on NVMe: all of them, of any length, and many reads at once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.arena import Arena
from kvcache.row_reader import SCRATCH_BYTES, RowReader, plan_extents
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier
from kvcache.unit_layout import UnitLayout
from tests.kvcache.weight_units import expected, fill


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[Callable[[UnitLayout], RowReader]]:
    """Makes a reader of one stored unit."""
    opened: list[ShardStore | RowReader | Arena] = []

    def make(unit: UnitLayout) -> RowReader:
        arena = Arena(Tier.HOST, unit.num_bytes)
        store = ShardStore(tmp_path / "weights", "key")
        store.open_units([unit], fill, arena.allocate, lambda num_bytes: None)
        reader = RowReader(store, max(slot.num_bytes // slot.shape[0] for slot in unit.tensors))
        opened.extend((reader, store, arena))
        return reader

    yield make
    for each in opened:
        each.close()


@given(
    st.lists(st.integers(0, 300), unique=True).map(sorted),
    st.integers(0, 10_000),
    st.integers(1, 9_000),
)
def test_extents_cover_exactly_the_rows(ids: list[int], offset: int, row_bytes: int) -> None:
    extents = plan_extents(ids, offset, row_bytes, 64 << 10)
    assert [(e.first, e.end) for e in extents] == [
        *itertools.pairwise([*(e.first for e in extents), len(ids)])
    ]
    for extent in extents:
        assert extent.start % 4096 == extent.stop % 4096 == 0
        assert extent.stop - extent.start <= 64 << 10
        for row in ids[extent.first : extent.end]:
            begin = offset + row * row_bytes
            assert extent.start <= begin and begin + row_bytes <= extent.stop


@pytest.mark.parametrize(
    ("num_rows", "row_elements"), [(300, 33), (40, 40_000), (4, SCRATCH_BYTES // 2)]
)
def test_rows_of_any_length(
    num_rows: int, row_elements: int, readers: Callable[[UnitLayout], RowReader]
) -> None:
    unit = UnitLayout.pack(
        "u0", [("b", (3,), torch.bfloat16), ("w", (num_rows, row_elements), torch.float32)]
    )
    reader, table = readers(unit), expected(unit)["w"]
    for count in (1, 3, 2 * num_rows):
        ids = torch.randint(num_rows, (count,))
        assert torch.equal(reader.read("u0", unit.slot("w"), ids)[0], table[ids])


def test_reads_wait_for_the_disk_together(
    readers: Callable[[UnitLayout], RowReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is kept busy answers each read late, so a pass's rows have to wait at once."""
    unit = UnitLayout.pack("u0", [("w", (256, 4096), torch.bfloat16)])
    reader, table = readers(unit), expected(unit)["w"]
    together = threading.Barrier(32, timeout=60)
    read_part = ShardStore.read_part

    def late(store: ShardStore, name: str, offset: int, buffer: torch.Tensor) -> None:
        together.wait()
        read_part(store, name, offset, buffer)

    monkeypatch.setattr(ShardStore, "read_part", late)
    ids = torch.arange(0, 256, 4)
    assert torch.equal(reader.read("u0", unit.slot("w"), ids)[0], table[ids])
