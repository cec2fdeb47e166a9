"""Hidden states of a pass too large for the device: they wait on the host and on NVMe between
layers.

A pass of many tokens goes through each layer slice by slice, so that a weight still moves once.
What a slice leaves behind is wanted when the next layer comes to it, which is known long before.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch

from kvcache.arena import ALIGNMENT, Arena
from kvcache.checksum import checksums
from kvcache.micro_batch import ACTIVATION_BUFFERS
from kvcache.private_folder import make_private
from kvcache.storage import DirectFile, reserve
from kvcache.storage.posix import PosixBackend
from kvcache.tier import Tier
from kvcache.trace import Trace
from kvcache.transfer_stats import Link, TransferStats

logger = logging.getLogger(__name__)


class ActivationStore:
    """Keeps the states of one pass at a time: `begin`, then in every layer `take` and `put` of
    every slice in order (the first layer takes none), then `end`.

    Slices lie on the host as long as there is room, the rest on NVMe. These pass through
    `ACTIVATION_BUFFERS` buffers on the host, one to a visit: while one is computed, the next is
    read and the last is written. Used by the thread that computes.
    """

    def __init__(
        self,
        *,
        host_bytes: int,
        nvme_bytes: int,
        slice_bytes: int,
        device: torch.device,
        host_arena: Arena,
        folder: Path | None,
        trace: Trace | None = None,
    ) -> None:
        """``host_bytes`` and ``nvme_bytes`` hold states, of which a slice has ``slice_bytes`` at
        most; with NVMe the first of the host's bytes are its buffers.

        Raises StoreError for a folder that others may enter, StorageError for a full disk and
        TierFullError.
        """
        self._device = device
        self._nvme_bytes = nvme_bytes
        self._buffers: list[torch.Tensor] = []
        self._file: DirectFile | None = None
        self._backend: PosixBackend | None = None
        if nvme_bytes:
            assert folder is not None, "activations on NVMe need a folder"
            size = padded_bytes(slice_bytes)
            self._buffers = [host_arena.allocate(size) for _ in range(ACTIVATION_BUFFERS)]
            host_bytes -= ACTIVATION_BUFFERS * size
            self._backend = PosixBackend()
            self._file = _nameless(folder, self._backend, nvme_bytes)
        self._memory = host_arena.allocate(host_bytes)
        self.transfers = TransferStats(trace)
        self._places: list[tuple[Tier, int, int]] = []
        self._forms: dict[int, tuple[torch.dtype, torch.Size]] = {}
        self._sums: dict[int, torch.Tensor] = {}
        self._reset()

    def _reset(self) -> None:
        self._on_nvme: list[int] = []
        self._visit = -1
        self._num_visits = 0
        self._taken = False
        self._reads: dict[int, Future[None]] = {}
        self._writes: dict[int, Future[None]] = {}
        self._lost: set[int] = set()

    def begin(self, sizes: Sequence[int], num_takes: int) -> None:
        """Start a pass: the bytes of each slice's states, and how often each is taken.

        Raises ValueError where the states are more than there is room for.
        """
        self._reset()
        self._places.clear()
        used = {Tier.HOST: 0, Tier.NVME: 0}
        for index, size in enumerate(sizes):
            fits = not self._on_nvme and used[Tier.HOST] + size <= self._memory.numel()
            tier = Tier.HOST if fits else Tier.NVME
            self._places.append((tier, used[tier], size))
            used[tier] += padded_bytes(size)
            if tier is Tier.NVME:
                self._on_nvme.append(index)
        if used[Tier.NVME] > self._nvme_bytes:
            raise ValueError(
                f"{used[Tier.NVME]} bytes of activations go to NVMe, which has {self._nvme_bytes}"
            )
        self._num_visits = len(self._on_nvme) * (1 + num_takes)

    def put(self, index: int, states: torch.Tensor) -> None:
        """Keep what a layer made of slice ``index``; ``states`` may then change."""
        self._forms[index] = states.dtype, states.shape
        found = states.contiguous().view(-1).view(torch.uint8)
        tier, start, size = self._places[index]
        assert found.numel() == size, f"slice {index} has {found.numel()} bytes, not {size}"
        link = Link("activations", Tier.DEVICE, tier)
        if tier is Tier.HOST:
            begun_s = self.transfers.begin(link)
            self._memory[start : start + size].copy_(found)
            self.transfers.end(link, size, begun_s, f"slice {index}")
            return
        assert self._file is not None and self._backend is not None
        self._visit += not self._taken
        self._taken = False
        self._wait_for_write(self._visit - ACTIVATION_BUFFERS)
        buffer = self._buffer(self._visit)
        buffer[:size].copy_(found)
        self._sums[index] = checksums(buffer.unsqueeze(0))
        begun_s = self.transfers.begin(link)
        future = self._backend.submit_write(self._file, start, buffer)
        future.add_done_callback(partial(self._count, link, buffer.numel(), begun_s, index))
        self._writes[self._visit] = future

    def take(self, index: int) -> torch.Tensor:
        """What `put` was given for slice ``index``, on the device; valid until the next `put`.

        What cannot be read back, or fails its checksum, comes as zeros and counts as lost.
        """
        tier, start, size = self._places[index]
        dtype, shape = self._forms[index]
        if tier is Tier.HOST:
            link = Link("activations", Tier.HOST, Tier.DEVICE)
            begun_s = self.transfers.begin(link)
            found = self._memory[start : start + size].view(dtype).view(shape).to(self._device)
            self.transfers.end(link, size, begun_s, f"slice {index}")
            return found
        self._visit += 1
        self._taken = True
        if self._visit not in self._reads:
            self._read(self._visit)
        buffer = self._buffer(self._visit)
        begun_s = time.perf_counter()
        error = self._reads.pop(self._visit).exception()
        self.transfers.add_stall(begun_s, f"activations of slice {index}")
        intact = torch.equal(checksums(buffer.unsqueeze(0)), self._sums[index])
        if error is not None or not intact:
            logger.warning("activations are lost: %s", error or "they fail their checksum")
            self._lost.add(index)
            buffer.zero_()
        if len(self._on_nvme) >= ACTIVATION_BUFFERS:
            self._read(self._visit + 1)
        return buffer[:size].view(dtype).view(shape).to(self._device)

    def end(self) -> tuple[int, ...]:
        """The pass is over, or was left in the middle: wait for what is under way. The slices of
        which states were lost, so that what it computed of them is worthless."""
        for future in (*self._reads.values(), *self._writes.values()):
            future.exception()
        lost = tuple(sorted(self._lost))
        self._reset()
        return lost

    @property
    def nvme_bytes(self) -> int:
        """What it takes of the disk."""
        return 0 if self._file is None else self._file.num_bytes

    def close(self) -> None:
        """Give the disk space back. Idempotent."""
        if self._file is not None and self._backend is not None:
            self._backend.close()
            self._file.close()

    def _slice(self, visit: int) -> int:
        return self._on_nvme[visit % len(self._on_nvme)]

    def _buffer(self, visit: int) -> torch.Tensor:
        size = padded_bytes(self._places[self._slice(visit)][2])
        return self._buffers[visit % ACTIVATION_BUFFERS][:size]

    def _read(self, visit: int) -> None:
        """Start what `take` will wait for, once its buffer is free and the slice was written."""
        if visit >= self._num_visits or visit < len(self._on_nvme):
            return
        assert self._file is not None and self._backend is not None
        self._wait_for_write(visit - ACTIVATION_BUFFERS)
        self._wait_for_write(visit - len(self._on_nvme))
        link = Link("activations", Tier.NVME, Tier.DEVICE)
        buffer, index = self._buffer(visit), self._slice(visit)
        begun_s = self.transfers.begin(link)
        future = self._backend.submit(self._file, self._places[index][1], buffer)
        future.add_done_callback(partial(self._count, link, buffer.numel(), begun_s, index))
        self._reads[visit] = future

    def _wait_for_write(self, visit: int) -> None:
        future = self._writes.pop(visit, None)
        if future is not None and (error := future.exception()) is not None:
            logger.warning("activations are lost: %s", error)
            self._lost.add(self._slice(visit))

    def _count(
        self, link: Link, num_bytes: int, begun_s: float, index: int, done: Future[None]
    ) -> None:
        moved = 0 if done.exception() else num_bytes
        self.transfers.end(link, moved, begun_s, f"slice {index}")


def padded_bytes(num_bytes: int) -> int:
    """The whole pages that ``num_bytes`` take."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _nameless(folder: Path, backend: PosixBackend, num_bytes: int) -> DirectFile:
    """A file without a name, so that nothing outlives the process, with its space reserved."""
    make_private(folder)
    path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.activations"
    file = backend.open(path, writable=True)
    try:
        path.unlink()
        reserve(file, num_bytes)
    except BaseException:
        file.close()
        raise
    return file
