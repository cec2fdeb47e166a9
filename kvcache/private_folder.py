"""Folders that only their owner may enter."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvcache.errors import StoreError


def make_private(folder: Path) -> None:
    """Create ``folder`` with mode 0700, or raise StoreError if others own it or may enter it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be made: {error.strerror}; give an nvme_dir you can write to"
        ) from error
    if status.st_uid != os.geteuid():
        raise StoreError(f"{folder} belongs to another user; give an nvme_dir of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise StoreError(
            f"{folder} is open to other users (mode {stat.S_IMODE(status.st_mode):o}); "
            f"run: chmod 700 {folder}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"{folder} is not writable; run: chmod 700 {folder}")
