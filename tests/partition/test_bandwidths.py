"""Rates by rows and by the size of requests, and what a tile leaves unused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planner_models import RATES

from partition import CodecRate, DiskRate
from partition.disk_probe import BLOCK_BYTES, probe_disk
from partition.errors import FieldError

KIB = 1 << 10
BY_SIZE = replace(
    RATES,
    disk_blocks=(
        DiskRate(block_bytes=4 * KIB, read=1e8, write=5e7),
        DiskRate(block_bytes=64 * KIB, read=5e8, write=2.5e8),
    ),
    kv_codecs=(CodecRate(storage_dtype="int8", encode=1e9, decode=2e9),),
)


def test_a_tile_that_is_not_full_takes_as_long_as_a_full_one() -> None:
    tiled = replace(RATES, row_tile=64)
    assert tiled.flops_per_s(64) == RATES.flops_per_s(64)
    assert tiled.flops_per_s(128) == RATES.flops_per_s(128)
    assert tiled.flops_per_s(96) == 0.75 * RATES.flops_per_s(96)
    assert tiled.flops_per_s(1) == RATES.flops_per_s(1) / 64


def test_a_small_request_has_the_rate_of_its_size() -> None:
    assert BY_SIZE.disk_read_of(4 * KIB) == BY_SIZE.disk_read_of(KIB) == 1e8
    assert BY_SIZE.disk_read_of(16 * KIB) == pytest.approx(3e8)  # halfway in the logarithm
    assert BY_SIZE.disk_write_of(16 * KIB) == pytest.approx(1.5e8)
    assert BY_SIZE.disk_read_of(1 << 30) == 5e8
    throttled = replace(BY_SIZE, disk_read=2e8)
    assert throttled.disk_read_of(64 * KIB) == 2e8  # none is above that of large ones
    assert RATES.disk_read_of(KIB) == RATES.disk_read


def test_a_share_of_the_disk_is_one_of_every_size_of_request() -> None:
    half = BY_SIZE.shared_by(2, ("disk",))
    assert half.disk_read_of(64 * KIB) == 2.5e8 and half.disk_write_of(4 * KIB) == 2.5e7
    assert half.kv_codecs == BY_SIZE.kv_codecs
    assert BY_SIZE.shared_by(2, ("compute",)).kv_codec("int8").decode == 1e9


def test_a_codec_that_was_not_measured_works_at_the_rate_of_memory() -> None:
    assert BY_SIZE.kv_codec("int8").encode == 1e9
    assert BY_SIZE.kv_codec("fp8").decode == RATES.device_memory


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(FieldError, match="let them rise"):
        replace(BY_SIZE, disk_blocks=BY_SIZE.disk_blocks[::-1])
    with pytest.raises(FieldError, match="none of int8, fp8"):
        CodecRate(storage_dtype="auto", encode=1e9, decode=1e9)


def test_the_disk_is_measured_by_the_size_of_requests(tmp_path: Path) -> None:
    found = probe_disk(tmp_path)
    assert tuple(rate.block_bytes for rate in found.blocks) == BLOCK_BYTES
    assert min(min(rate.read, rate.write) for rate in found.blocks) > 0
    assert found.blocks[0].read < found.read  # 512 requests of 16 KiB for one of 8 MiB
    assert not list(tmp_path.iterdir())
