"""Sizes, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from giantserve.errors import ConfigError
from giantserve.units import parse_bytes
from partition.byte_size import format_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("256MiB", 2**28),
        ("2 GiB", 2**31),
        ("1.5gb", 1_500_000_000),
        ("4096", 4096),
        ("0", 0),
        ("3K", 3072),
        ("1.1KiB", 1126),
        (" 1 TiB ", 2**40),
        (7, 7),
    ],
)
def test_parse(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 PiB", "1e9", "1,5GB", "nan", -1, True, 1.5])
def test_refuse(text: str | int) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 * 2**29, "1.5 GiB"), (-(2**20), "-1 MiB")],
)
def test_format(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(min_value=0, max_value=2**50))
def test_what_is_written_is_read_back_within_the_rounding(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.06, abs=0.5)
