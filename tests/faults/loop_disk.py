"""A disk of its own for a test, which can fail, fill or crawl while the machine's disk does not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system on a loop device: ``image`` is the file that is its disk."""

    image: Path
    folder: Path


@contextmanager
def mounted_disk(parent: Path, num_bytes: int) -> Iterator[Disk]:
    """Skips, with the reason, where this user may not make one."""
    disk = Disk(parent / "image", parent / "mounted")
    disk.folder.mkdir()
    with disk.image.open("wb") as image:
        image.truncate(num_bytes)
    for command in (
        ["mkfs.ext4", "-q", "-m", "0", str(disk.image)],
        ["mount", "-o", "loop", str(disk.image), str(disk.folder)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"no file system can be made here: {error}")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk.folder)], check=True)
