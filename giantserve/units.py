"""Sizes as people write them: ``256MiB``, ``2 GiB``, ``1.5GB``, ``4096``."""

from __future__ import annotations

import re
from decimal import Decimal

from giantserve.errors import ConfigError

_MULTIPLES = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_bytes(size: str | int) -> int:
    """Bytes of a size. KiB, MiB, GiB, TiB (or K, M, G, T) go by 1024; KB, MB, GB, TB by 1000.

    A fraction of a byte is cut off. Raises ConfigError for anything else, negative numbers too.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    multiple = _MULTIPLES.get(match[2].lower()) if match else None
    if match is None or multiple is None:
        raise ConfigError(f"{size!r} is not a size; write bytes or a unit, as in '2GiB' or '500MB'")
    return int(Decimal(match[1]) * multiple)


def format_bytes(num_bytes: int) -> str:
    """A size for people: ``1.5 GiB``. Whole numbers lose the decimal."""
    sign, value = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    for unit, multiple in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= multiple:
            return f"{sign}{value / multiple:.1f}".removesuffix(".0") + f" {unit}"
    return f"{sign}{value} B"
