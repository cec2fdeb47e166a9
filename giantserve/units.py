"""Sizes in options: bytes, or text as people write it."""

from __future__ import annotations

from giantserve.errors import ConfigError
from partition import byte_size


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as ``2GiB`` or ``4096``. Raises ConfigError for what is none."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    try:
        return byte_size.parse_bytes(size if isinstance(size, str) else f"{size!r} (a number)")
    except ValueError as error:
        raise ConfigError(str(error)) from None
