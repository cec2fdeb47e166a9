"""Sizes as people write them: ``256MiB``, ``2 GiB``, ``1.5GB``, ``4096``."""

from __future__ import annotations

import re
from decimal import Decimal

BINARY = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_MULTIPLES = {
    "": 1,
    "b": 1,
    **{unit.lower(): multiple for unit, multiple in BINARY.items()},
    **{unit[0].lower(): multiple for unit, multiple in BINARY.items()},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes of a size. KiB, MiB, GiB, TiB (or K, M, G, T) go by 1024; KB, MB, GB, TB by 1000.

    A fraction of a byte is cut off. Raises ValueError for anything else, negative numbers too.
    """
    match = _SIZE.fullmatch(text)
    multiple = _MULTIPLES.get(match[2].lower()) if match else None
    if match is None or multiple is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a unit, as in '2GiB' or '500MB'")
    return int(Decimal(match[1]) * multiple)


def format_bytes(num_bytes: int) -> str:
    """A size for people: ``1.5 GiB``. Whole numbers lose the decimal."""
    sign, value = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    for unit, multiple in BINARY.items():
        if value >= multiple:
            return f"{sign}{value / multiple:.1f}".removesuffix(".0") + f" {unit}"
    return f"{sign}{value} B"
