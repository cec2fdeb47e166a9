"""Hidden states between the layers of a pass, on host and NVMe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcache.activations import ActivationStore
from kvcache.arena import Arena
from kvcache.errors import StoreError
from kvcache.tier import Tier
from kvcache.transfer_stats import Link

PAGE = 4096
HIDDEN = 96
ROW = HIDDEN * 2
SLICE_ROWS = 40
BUFFERS = 3 * 2 * PAGE


@contextmanager
def store(folder: Path, host_pages: int, nvme_pages: int) -> Iterator[ActivationStore]:
    host_bytes = host_pages * PAGE + (BUFFERS if nvme_pages else 0)
    arena = Arena(Tier.HOST, host_bytes)
    made = ActivationStore(
        host_bytes=host_bytes,
        nvme_bytes=nvme_pages * PAGE,
        slice_bytes=SLICE_ROWS * ROW,
        device=torch.device("cpu"),
        host_arena=arena,
        folder=folder / "activations",
    )
    try:
        yield made
    finally:
        made.close()


def layers(made: ActivationStore, rows: Sequence[int], num_layers: int) -> list[torch.Tensor]:
    """A pass whose layers add 1 to each state in place: what the last one was given."""
    made.begin([count * ROW for count in rows], num_layers)
    for index, count in enumerate(rows):
        made.put(index, torch.full((count, HIDDEN), float(index), dtype=torch.bfloat16))
    for _ in range(num_layers - 1):
        for index in range(len(rows)):
            made.put(index, made.take(index).add_(1))
    return [made.take(index).clone() for index in range(len(rows))]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.integers(1, SLICE_ROWS), min_size=1, max_size=9),
    host_pages=st.integers(0, 12),
    num_layers=st.integers(1, 6),
)
def test_states_come_back(
    rows: list[int], host_pages: int, num_layers: int, tmp_path: Path
) -> None:
    with store(tmp_path, host_pages, 18) as made:
        for _ in range(2):  # a store serves one pass after another
            found = layers(made, rows, num_layers)
            assert made.end() == ()
            for index, (states, count) in enumerate(zip(found, rows, strict=True)):
                expected = torch.full((count, HIDDEN), index + num_layers - 1.0)
                assert torch.equal(states.float(), expected)
        assert list((tmp_path / "activations").iterdir()) == []


def test_slices_fill_the_host_and_then_nvme(tmp_path: Path) -> None:
    with store(tmp_path, 3, 6) as made:
        layers(made, [20, 20, 20], 2)  # a page each, and two pages
        assert made.end() == ()
        assert {link.source for link in made.transfers.snapshot()} == {Tier.DEVICE, Tier.HOST}
        layers(made, [40, 40, 40], 2)  # two pages each: one fits the host
        assert made.end() == ()
        totals = made.transfers.snapshot()
    # every slice once a layer; nothing is read ahead that no layer asks for
    assert totals[Link("activations", Tier.DEVICE, Tier.NVME)].num_bytes == 2 * 2 * 2 * PAGE
    assert totals[Link("activations", Tier.NVME, Tier.DEVICE)].num_bytes == 2 * 2 * 2 * PAGE


def test_more_than_there_is_room_for_is_refused(tmp_path: Path) -> None:
    with store(tmp_path, 1, 2) as made:
        made.begin([20 * ROW, 40 * ROW], 1)
        made.end()
        with pytest.raises(ValueError, match="16384 bytes of activations go to NVMe"):
            made.begin([20 * ROW, 40 * ROW, 40 * ROW], 1)


def test_a_pass_may_be_left_in_the_middle(tmp_path: Path) -> None:
    with store(tmp_path, 0, 18) as made:
        made.begin([40 * ROW] * 4, 8)
        for index in range(4):
            made.put(index, torch.ones(40, HIDDEN, dtype=torch.bfloat16))
        made.take(0)
        assert made.end() == ()
        assert len(layers(made, [40, 3], 3)) == 2


def _file_of() -> str:
    folder = Path(f"/proc/{os.getpid()}/fd")
    for name in os.listdir(folder):
        try:
            if os.readlink(folder / name).endswith(".activations (deleted)"):
                return str(folder / name)
        except FileNotFoundError:
            continue
    raise AssertionError("no file of activations is open")


@pytest.mark.parametrize("fault", ["flip", "cut", "none"])
def test_what_the_disk_loses_is_known(fault: str, tmp_path: Path) -> None:
    with store(tmp_path, 2, 18) as made:
        made.begin([40 * ROW] * 4, 2)
        for index in range(4):
            made.put(index, torch.ones(40, HIDDEN, dtype=torch.bfloat16))
        for future in made._writes.values():
            future.result()
        descriptor = os.open(_file_of(), os.O_RDWR)
        if fault == "flip":
            (byte,) = os.pread(descriptor, 1, 2 * PAGE + 5)  # of the second slice on NVMe
            os.pwrite(descriptor, bytes([byte ^ 1]), 2 * PAGE + 5)
        if fault == "cut":
            os.ftruncate(descriptor, 2 * PAGE)
        os.close(descriptor)
        found = [made.take(index).float().sum().item() for index in range(4)]
        lost = {"flip": (2,), "cut": (2, 3), "none": ()}[fault]
        assert made.end() == lost
        assert [value == 0 for value in found] == [index in lost for index in range(4)]
        assert made.end() == ()


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "activations").mkdir(mode=0o755)
    with pytest.raises(StoreError, match="chmod 700"), store(tmp_path, 0, 4):
        pass
