"""KV blocks on NVMe, layer by layer: one file of a running shard, gone with its process or kept."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path

from kvcache.kept_index import KeptIndex
from kvcache.private_folder import make_private
from kvcache.storage import DirectFile, reserve
from kvcache.storage.posix import Part, PosixBackend

logger = logging.getLogger(__name__)


class KVFile:
    """``num_blocks`` blocks; the pieces that one layer has of them lie side by side.

    The file has no name once it is open, so that nothing outlives the process, however it ends;
    unless it is ``kept_as`` a name, which one process can use at a time.
    """

    def __init__(
        self,
        folder: Path,
        piece_bytes: Sequence[int],
        num_blocks: int,
        backend: PosixBackend,
        kept_as: str | None = None,
    ) -> None:
        """``piece_bytes``: of each layer, multiples of 4096. Reserves the disk space.

        Raises StoreError for a folder that others may enter, StorageError for a full disk, of which
        it then takes nothing.
        """
        make_private(folder)
        self._piece_bytes = list(piece_bytes)
        self._num_blocks = num_blocks
        sizes = [size * num_blocks for size in piece_bytes]
        self._starts = [0, *accumulate(sizes)]
        self._backend = backend
        self._index: Path | None = None
        path = folder / (f"{kept_as}.kv" if kept_as else f"{os.getpid()}-{secrets.token_hex(4)}.kv")
        self._file: DirectFile = backend.open(path, writable=True)
        try:
            if kept_as and not _lock(self._file):
                logger.warning("%s is in use: cached prefixes of this process are not kept", path)
                self._file.close()
                path = path.with_suffix(f".{secrets.token_hex(4)}")
                self._file = backend.open(path, writable=True)
            elif kept_as:
                self._index = path.with_suffix(".index")
            if self._index is None:
                path.unlink()
            reserve(self._file, self._starts[-1])
        except BaseException:
            if self._index is not None:
                self._index.unlink(missing_ok=True)
                os.ftruncate(self._file.descriptor, 0)
            self._file.close()
            raise

    @property
    def _layout(self) -> str:
        """How the file lies, to tell an index of another layout by."""
        return f"{self._num_blocks} blocks of {self._piece_bytes}, checked by XXH3"

    @property
    def num_bytes(self) -> int:
        """What the file takes of the disk."""
        return self._file.num_bytes

    def kept(self) -> KeptIndex:
        """What an earlier process left here; nothing in a file without a name."""
        path = self._index or Path(os.devnull)
        return KeptIndex.read(path, self._layout, len(self._piece_bytes), self._num_blocks)

    def keep(self, index: KeptIndex) -> None:
        """Leave ``index`` for a later process, if the file has a name; all writes are over.

        Raises OSError.
        """
        if self._index is not None:
            os.fsync(self._file.descriptor)
            index.write(self._index, self._layout)

    def submit_read(self, layer: int, block: int, parts: Sequence[Part]) -> Future[None]:
        """Start reading pieces of the ``layer``-th layer from ``block`` on, as many as the parts
        take one after the other, by one call of the kernel."""
        return self._backend.submit_stretches(self._file, [(self._offset(layer, block), parts)])

    def submit_write(self, layer: int, runs: Sequence[tuple[int, memoryview]]) -> Future[None]:
        """Start writing pieces of the ``layer``-th layer: of each run, from its block on."""
        stretches = [(self._offset(layer, block), [memory]) for block, memory in runs]
        return self._backend.submit_stretches(self._file, stretches, write=True)

    def close(self) -> None:
        """End the backend and give the disk space back. Idempotent."""
        self._backend.close()
        self._file.close()

    def _offset(self, layer: int, block: int) -> int:
        return self._starts[layer] + block * self._piece_bytes[layer]


def _lock(file: DirectFile) -> bool:
    """Whether this process has the file for itself now, until it closes it."""
    try:
        fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
