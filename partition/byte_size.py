"""Byte counts as people write them: "256MiB", "1.5 GB", 4096."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_byte_size(text: str) -> int:
    """Bytes meant by ``text``. Raises ValueError where it is no size with a known unit."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write bytes or, for example, 256MiB or 1.5GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_byte_size(num_bytes: int) -> str:
    """A short form in binary units: exact where ``num_bytes`` is a whole number of them."""
    for power, unit in reversed(list(enumerate(("B", "KiB", "MiB", "GiB", "TiB")))):
        size = num_bytes / 1024**power
        if size >= 1 or power == 0:
            return f"{size:.0f} {unit}" if size == int(size) else f"{size:.2f} {unit}"
    raise AssertionError
