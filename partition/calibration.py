"""What was measured of a machine, and where it is kept."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from partition import cache
from partition.bandwidths import Bandwidths
from partition.errors import PlanError
from partition.links import Link

CALIBRATION_VERSION = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Where and when (ISO 8601) it was measured, and the rates.

    ``direct_io``: the disk was read past the page cache. ``storage``: bytes/s of the storage
    backends that run here. ``link`` joins two shards of the machine.
    """

    machine: str
    folder: str
    device: str
    dtype: str
    measured_at: str
    direct_io: bool
    storage: dict[str, float]
    bandwidths: Bandwidths
    link: Link
    version: int = CALIBRATION_VERSION

    @property
    def storage_backend(self) -> str:
        """The backend that reads fastest."""
        return max(self.storage, key=lambda name: self.storage[name])


def machine_name() -> str:
    """What a calibration holds for: the host and the CPUs this process may use."""
    return f"{platform.node()} {platform.machine()} {len(os.sched_getaffinity(0))} cpus"


def cache_path(cache_folder: Path | None, folder: Path, device: str, dtype: str) -> Path:
    """The file of the calibration with this device and dtype and the disk of ``folder``.

    Raises PlanError where ``folder`` cannot be looked at.
    """
    try:
        disk = os.stat(folder).st_dev
    except OSError as error:
        raise PlanError(
            f"cannot measure the disk of {folder}: {error}; name a folder that can be written"
        ) from None
    key = "\0".join((machine_name(), str(disk), device, dtype))
    name = f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return (cache_folder or cache.default_cache_folder()) / name


def load(path: Path) -> Calibration | None:
    """The cached calibration; None where there is none, or one that this version cannot read."""
    found = cache.load(Calibration, path)
    return found if found is not None and found.version == CALIBRATION_VERSION else None
