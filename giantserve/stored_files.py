"""The files that a model's shards leave below ``nvme_dir``: they begin with the model's name."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

MAX_NAME = 40


def file_prefix(model: Path) -> str:
    """Of the files of the model in this folder, and of no other's."""
    folder = model.resolve()
    name = re.sub(r"[^\w.-]+", "_", folder.name)[:MAX_NAME]
    return f"{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}-"


def stored_bytes(nvme_dir: Path, model: Path) -> int:
    """What the model's files take of the disk; those that vanish meanwhile take nothing."""
    prefix = file_prefix(model)
    total = 0
    for path in nvme_dir.glob(f"*/{prefix}*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total
