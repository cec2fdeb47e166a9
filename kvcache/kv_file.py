"""KV blocks on NVMe, layer by layer: one file of a running shard, gone with its process."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path

import torch

from kvcache.private_folder import make_private
from kvcache.storage import DirectFile, StorageBackend, reserve


class KVFile:
    """``num_blocks`` blocks; the pieces that one layer has of them lie side by side.

    The file has no name once it is open, so that nothing outlives the process, however it ends.
    """

    def __init__(
        self, folder: Path, piece_bytes: Sequence[int], num_blocks: int, backend: StorageBackend
    ) -> None:
        """``piece_bytes``: of each layer, multiples of 4096. Reserves the disk space.

        Raises StoreError for a folder that others may enter, StorageError for a full disk.
        """
        make_private(folder)
        self._piece_bytes = list(piece_bytes)
        sizes = [size * num_blocks for size in piece_bytes]
        self._starts = [0, *accumulate(sizes)]
        self._backend = backend
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.kv"
        self._file: DirectFile = backend.open(path, writable=True)
        try:
            path.unlink()
            reserve(self._file, self._starts[-1])
        except BaseException:
            self._file.close()
            raise

    def submit_read(self, layer: int, block: int, buffer: torch.Tensor) -> Future[None]:
        """Start reading the pieces of the ``layer``-th layer from ``block`` on, as many as fill
        ``buffer``."""
        return self._backend.submit(self._file, self._offset(layer, block), buffer)

    def submit_write(self, layer: int, block: int, buffer: torch.Tensor) -> Future[None]:
        """Start writing pieces of the ``layer``-th layer from ``block`` on."""
        return self._backend.submit_write(self._file, self._offset(layer, block), buffer)

    def close(self) -> None:
        """End the backend and give the disk space back. Idempotent."""
        self._backend.close()
        self._file.close()

    def _offset(self, layer: int, block: int) -> int:
        return self._starts[layer] + block * self._piece_bytes[layer]
