"""How files are read and written directly, past the page cache: one interface, several backends."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcache.arena import ALIGNMENT
from kvcache.errors import StorageError


@dataclass(slots=True)
class DirectFile:
    """An open file. ``direct``: it bypasses the page cache; otherwise its pages are dropped after
    use."""

    path: Path
    descriptor: int
    direct: bool

    @property
    def num_bytes(self) -> int:
        """How long the file is."""
        return os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Close the descriptor. Idempotent; no transfer may be under way."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class StorageBackend(ABC):
    """Moves bytes between files and CPU memory.

    Offsets, lengths and addresses are multiples of 4096 (`Arena` gives such buffers); ValueError
    otherwise. A transfer that fails raises StorageError with the path and the offset. Thread-safe.
    """

    def open(self, path: Path, *, writable: bool = False) -> DirectFile:
        """Open ``path``; a writable file is created with mode 0600 and keeps what it held.

        Raises OSError as `os.open` does.
        """
        flags = os.O_CLOEXEC | (os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
        try:
            return DirectFile(path, os.open(path, flags | os.O_DIRECT, 0o600), direct=True)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which a file system without O_DIRECT answers
                raise
        return DirectFile(path, os.open(path, flags, 0o600), direct=False)

    @abstractmethod
    def read(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> None:
        """Fill ``buffer`` from ``offset`` on, in the calling thread."""

    @abstractmethod
    def submit(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> Future[None]:
        """Start filling ``buffer``, which the caller leaves alone until the future is done.

        Reads run in the order of submission. Callbacks of the future run in the backend's threads.
        """

    @abstractmethod
    def submit_write(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> Future[None]:
        """Start writing ``buffer``, which the caller leaves as it is until the future is done."""

    def write(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> None:
        """Write all of ``buffer`` at ``offset``; returns when it was handed to the device."""
        self.submit_write(file, offset, buffer).result()

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way and end the threads. Idempotent."""


def check_aligned(offset: int, buffer: torch.Tensor) -> None:
    """Raise ValueError unless ``offset`` and the CPU byte tensor ``buffer`` suit direct
    transfers."""
    length = buffer.numel()
    if buffer.dtype is not torch.uint8 or buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise ValueError("a transfer buffer is a contiguous uint8 tensor in CPU memory")
    if offset % ALIGNMENT or length % ALIGNMENT or buffer.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"direct transfers go by {ALIGNMENT} bytes: offset {offset}, length {length}, "
            f"address {buffer.data_ptr():#x}"
        )


def reserve(file: DirectFile, num_bytes: int) -> None:
    """Claim the disk space now, so that a full disk is an error at the start and not after
    minutes."""
    if num_bytes == 0:
        return
    try:
        os.posix_fallocate(file.descriptor, 0, num_bytes)
        os.ftruncate(file.descriptor, num_bytes)
    except OSError as error:
        raise StorageError(
            str(file.path),
            0,
            f"cannot reserve {num_bytes} bytes: {error.strerror}; free space (what "
            "old plans left in its folder may be deleted) or give another nvme_dir",
        ) from error


def _posix() -> StorageBackend:
    from kvcache.storage.posix import PosixBackend

    return PosixBackend()


def _deepnvme() -> StorageBackend:
    from kvcache.storage.deepnvme import DeepNVMeBackend

    return DeepNVMeBackend()


BACKENDS: dict[str, Callable[[], StorageBackend]] = {"posix": _posix, "deepnvme": _deepnvme}
"""Backends by name; each is imported when it is made."""
