"""The weights of one rank on disk: every unit one aligned, checksummed extent of one file, written
once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvcache.arena import ALIGNMENT
from kvcache.errors import CorruptUnitError, StoreError
from kvcache.private_folder import make_private
from kvcache.storage import BACKENDS, DirectFile, StorageBackend, reserve
from kvcache.unit_layout import UnitLayout

STORE_VERSION = 1
MAX_TRIES, RETRY_PERIOD_S = 100, 0.1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredUnit:
    """Where a unit lies in the file. ``checksum`` is the CRC-32 of its ``num_bytes``, ``sections``
    those of its parts that are read by themselves."""

    name: str
    offset: int
    num_bytes: int
    checksum: int
    sections: tuple[int, ...] = ()

    @classmethod
    def read(cls, line: dict[str, Any]) -> StoredUnit:
        """From JSON. Raises TypeError or ValueError for what is none."""
        values = dict(line)
        return cls(**{**values, "sections": tuple(values.get("sections", ()))})


class ShardStore:
    """``KEY.weights`` and its index ``KEY.json`` in a private folder.

    A pack under way is ``KEY.weights.partial`` and a journal ``KEY.journal``, one line for each
    unit that is safely on disk; the next pack of the same key goes on after the last of them. A
    lock file lets several processes read a store and only one write it.
    """

    def __init__(
        self, folder: Path, key: str, *, backend: str = "posix", verify_first_read: bool = True
    ) -> None:
        """``key`` names exactly which bytes these are: model, rank, layers, dtype.

        ``verify_first_read``: check each unit once a process. Raises StoreError for a folder that
        others may enter, ValueError for an unknown backend.
        """
        if backend not in BACKENDS:
            raise ValueError(f"storage backend {backend!r} is not one of {sorted(BACKENDS)}")
        make_private(folder)
        stem = (
            re.sub(r"[^\w.-]+", "_", key)[:160] + "-" + hashlib.sha256(key.encode()).hexdigest()[:8]
        )
        self.key = key
        self.path = folder / f"{stem}.weights"
        self._partial = folder / f"{stem}.weights.partial"
        self._index = folder / f"{stem}.json"
        self._journal = folder / f"{stem}.journal"
        self._verify_first_read = verify_first_read
        self._units: dict[str, StoredUnit] = {}
        self._verified: set[str | tuple[str, int]] = set()
        self._sections: dict[str, Sequence[tuple[int, int]]] = {}
        self._verified_lock = threading.Lock()
        self._file: DirectFile | None = None
        self.backend: StorageBackend = BACKENDS[backend]()
        self._lock = os.open(folder / f"{stem}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def open_units(
        self,
        units: Sequence[UnitLayout],
        fill: Callable[[UnitLayout, torch.Tensor], None],
        staging: Callable[[int], torch.Tensor],
        progress: Callable[[int], None] | None = None,
    ) -> bool:
        """`open_or_pack` of units as they lie in memory. ``staging`` is given the bytes of the
        largest."""
        by_name = {unit.name: unit for unit in units}
        return self.open_or_pack(
            [(unit.name, unit.num_bytes) for unit in units],
            lambda name, buffer: fill(by_name[name], buffer),
            lambda: staging(max(unit.num_bytes for unit in units)),
            progress,
            {unit.name: unit.sections() for unit in units if unit.num_experts},
        )

    def open_or_pack(
        self,
        units: Sequence[tuple[str, int]],
        fill: Callable[[str, torch.Tensor], None],
        staging: Callable[[], torch.Tensor],
        progress: Callable[[int], None] | None = None,
        sections: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> bool:
        """Open the store if it holds exactly ``units`` (name, bytes) of this key; write it if not.

        ``sections`` are the bytes [start, stop) of a unit's parts that have a checksum of their
        own.

        ``fill(name, buffer)`` writes a unit's bytes. ``staging()`` gives the buffer, as large as
        the largest unit, and is called only if something must be written. ``progress`` gets the
        bytes of every unit that is there. Waits while another process packs the same store, and
        goes on where one stopped before the end. Returns whether anything was written.
        """
        packed = False
        self._sections = dict(sections or {})
        for _ in range(MAX_TRIES):
            if self._lock_exclusively() and not self._load_index(units):
                try:
                    self._pack(units, fill, staging, progress)
                except BaseException:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
                    raise
                packed = True
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # waits for who packs
            if self._load_index(units):
                break
            if self._index.exists():
                raise StoreError(
                    f"{self.path} is in use by another process and holds other units; stop it, "
                    "or give this one its own nvme_dir"
                )
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            time.sleep(RETRY_PERIOD_S)
        else:
            raise StoreError(f"{self.path} is in use, but its index is gone; stop who uses it")
        if not packed and progress is not None:
            for _, num_bytes in units:
                progress(num_bytes)
        self._file = self.backend.open(self.path)
        if not self._file.direct:
            logger.warning("%s is read through the page cache: no O_DIRECT there", self.path)
        return packed

    @property
    def num_bytes(self) -> int:
        """How long the file is; 0 before it is open."""
        return 0 if self._file is None else self._file.num_bytes

    def submit(self, unit: str, buffer: torch.Tensor) -> Future[None]:
        """Start reading ``unit`` into ``buffer`` (uint8, exactly its size)."""
        stored = self._units[unit]
        assert self._file is not None, "the store is not open"
        return self.backend.submit(self._file, stored.offset, buffer[: stored.num_bytes])

    def check_first_read(self, unit: str, buffer: torch.Tensor) -> None:
        """Compare the bytes just read with the checksum, the first time only. Raises
        CorruptUnitError."""
        with self._verified_lock:
            if not self._verify_first_read or unit in self._verified:
                return
        stored = self._units[unit]
        if _checksum(buffer[: stored.num_bytes]) != stored.checksum:
            raise CorruptUnitError(unit, str(self.path))
        with self._verified_lock:
            self._verified.add(unit)

    def submit_part(self, unit: str, offset: int, buffer: torch.Tensor) -> Future[None]:
        """Start filling ``buffer`` from byte ``offset`` of ``unit`` on; 4096-aligned."""
        stored = self._units[unit]
        assert self._file is not None, "the store is not open"
        assert offset + buffer.numel() <= stored.num_bytes
        return self.backend.submit(self._file, stored.offset + offset, buffer)

    def check_section(self, unit: str, section: int, buffer: torch.Tensor) -> None:
        """`check_first_read` of one section of ``unit``, whose bytes all lie in ``buffer``."""
        with self._verified_lock:
            known = unit in self._verified or (unit, section) in self._verified
        if known or not self._verify_first_read:
            return
        start, stop = self._sections[unit][section]
        if _checksum(buffer[start:stop]) != self._units[unit].sections[section]:
            raise CorruptUnitError(unit, str(self.path))
        with self._verified_lock:
            self._verified.add((unit, section))

    def read_part(self, unit: str, offset: int, buffer: torch.Tensor) -> None:
        """Fill ``buffer`` from byte ``offset`` of ``unit`` on, in the calling thread;
        4096-aligned."""
        stored = self._units[unit]
        assert self._file is not None, "the store is not open"
        assert offset + buffer.numel() <= stored.num_bytes
        self.backend.read(self._file, stored.offset + offset, buffer)

    def verify(self, buffer: torch.Tensor, units: Sequence[str] | None = None) -> None:
        """Read ``units`` (all, if None) through ``buffer`` and check them. Raises
        CorruptUnitError."""
        size = buffer.numel() // ALIGNMENT * ALIGNMENT
        for name in units if units is not None else list(self._units):
            stored = self._units[name]
            checksum = 0
            for offset in range(0, stored.num_bytes, size):
                part = buffer[: min(size, stored.num_bytes - offset)]
                self.read_part(name, offset, part)
                checksum = _checksum(part, checksum)
            if checksum != stored.checksum:
                raise CorruptUnitError(name, str(self.path))
            with self._verified_lock:
                self._verified.add(name)

    def verify_first_read(self, buffer: torch.Tensor, unit: str) -> None:
        """`verify` one unit, unless that is switched off or already done."""
        if self._verify_first_read and unit not in self._verified:
            self.verify(buffer, [unit])

    def close(self) -> None:
        """Close the files and end the backend's threads. Idempotent."""
        self.backend.close()
        if self._file is not None:
            self._file.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _lock_exclusively(self) -> bool:
        """Whether nobody else holds the lock."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _load_index(self, units: Sequence[tuple[str, int]]) -> bool:
        try:
            index = json.loads(self._index.read_text())
            stored = [StoredUnit.read(unit) for unit in index["units"]]
            size = self.path.stat().st_size
            is_ours = (index["version"], index["key"]) == (STORE_VERSION, self.key)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        end = max((unit.offset + unit.num_bytes for unit in stored), default=0)
        if not is_ours or size < end or [(u.name, u.num_bytes) for u in stored] != list(units):
            return False
        if any(len(u.sections) != len(self._sections.get(u.name, ())) for u in stored):
            return False
        self._units = {unit.name: unit for unit in stored}
        return True

    def _pack(
        self,
        units: Sequence[tuple[str, int]],
        fill: Callable[[str, torch.Tensor], None],
        staging: Callable[[], torch.Tensor],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._index.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        done = self._load_journal(units)
        total = sum(num_bytes for _, num_bytes in units)
        buffer: torch.Tensor | None = None
        file = self.backend.open(self._partial, writable=True)
        try:
            reserve(file, total)
            with open(self._journal, "a", opener=_private) as journal:
                if not done:
                    journal.write(json.dumps({"version": STORE_VERSION, "key": self.key}) + "\n")
                offset = 0
                for index, (name, num_bytes) in enumerate(units):
                    if index >= len(done):
                        buffer = staging() if buffer is None else buffer
                        part = buffer[:num_bytes]
                        part.zero_()
                        fill(name, part)
                        self.backend.write(file, offset, part)
                        os.fdatasync(file.descriptor)
                        done.append(self._stored(name, offset, part))
                        journal.write(json.dumps(asdict(done[-1])) + "\n")
                        journal.flush()
                    offset += num_bytes
                    if progress is not None:
                        progress(num_bytes)
            os.fsync(file.descriptor)
        finally:
            file.close()
        self._publish(done)

    def _stored(self, name: str, offset: int, part: torch.Tensor) -> StoredUnit:
        sections = self._sections.get(name, ())
        sums = tuple(_checksum(part[start:stop]) for start, stop in sections)
        return StoredUnit(name, offset, part.numel(), _checksum(part), sums)

    def _load_journal(self, units: Sequence[tuple[str, int]]) -> list[StoredUnit]:
        """The units an earlier, interrupted pack finished; drops what does not belong to this
        pack."""
        done: list[StoredUnit] = []
        try:
            lines = self._journal.read_bytes().split(b"\n")
            header = json.loads(lines[0])
            if header == {"version": STORE_VERSION, "key": self.key} and self._partial.exists():
                # The text after the last newline is empty, or a line that was being written.
                for line, expected in zip(lines[1:-1], units, strict=False):
                    unit = StoredUnit.read(json.loads(line))
                    sections = self._sections.get(unit.name, ())
                    if (unit.name, unit.num_bytes) != expected or len(sections) != len(
                        unit.sections
                    ):
                        break
                    done.append(unit)
        except (OSError, ValueError, TypeError):
            done = []
        self._journal.unlink(missing_ok=True)
        if not done:
            self._partial.unlink(missing_ok=True)
            return done
        text = [json.dumps({"version": STORE_VERSION, "key": self.key})]
        text += [json.dumps(asdict(unit)) for unit in done]
        with open(self._journal, "w", opener=_private) as journal:
            journal.write("\n".join(text) + "\n")
        return done

    def _publish(self, units: list[StoredUnit]) -> None:
        temporary = self._index.with_suffix(".json.partial")
        with open(temporary, "w", opener=_private) as index:
            json.dump(
                {
                    "version": STORE_VERSION,
                    "key": self.key,
                    "units": [asdict(unit) for unit in units],
                },
                index,
            )
            index.flush()
            os.fsync(index.fileno())
        self._partial.rename(self.path)
        temporary.rename(self._index)
        self._journal.unlink(missing_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._units = {unit.name: unit for unit in units}


def _checksum(buffer: torch.Tensor, start: int = 0) -> int:
    return zlib.crc32(buffer.numpy().data, start)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
