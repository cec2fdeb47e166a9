"""What was found out once and is kept as JSON in a folder of the user's."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from partition.codec import decode, encode

T = TypeVar("T")


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/giantserve`` or ``~/.cache/giantserve``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "giantserve"


def load(cls: type[T], path: Path) -> T | None:
    """The dataclass kept at ``path``; None where there is none, or one that ``cls`` cannot be."""
    try:
        return decode(cls, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def store(path: Path, value: Any) -> None:
    """Write atomically; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(encode(value), file, indent=2)
    os.replace(name, path)
