"""Collectives of CPU ranks on one machine, through memory that they share.

gloo takes about 0.2 ms for an all-reduce of a few KiB, and a decode pass makes two a layer. Here a
rank copies its part into its slot, raises its flag and waits for the others' flags; then everyone
reads all slots. The slots are used in turn: a rank that writes its next part but one knows that all
have read this one, because they have written the part between.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

FOLDER = Path("/dev/shm")
SLOT_BYTES = 1 << 20
FLAG_BYTES = 64
"""A cache line a rank, so that raising one flag does not disturb the reading of another."""

ORDERED_STORES = ("x86_64", "AMD64")
"""Machines on which others see a rank's part no later than its flag, without fences."""

SPINS = 2000
NAP_S = 2e-5


class SharedMemoryGroup:
    """One rank's view of the group's memory. Every rank must make the same calls in the same order.

    A peer that dies leaves the others waiting: whoever watches the ranks has to end them.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world: int) -> None:
        self._rank = rank
        self._world = world
        stride = FLAG_BYTES // 8
        self._flags = np.frombuffer(memory, np.int64, world * stride)[::stride]
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=world * FLAG_BYTES)
        self._slots = slots.view(2, world, SLOT_BYTES)
        self._turn = 0

    @classmethod
    def join(
        cls, rank: int, group: dist.ProcessGroup, ranks: Sequence[int]
    ) -> SharedMemoryGroup | None:
        """Meet over ``group``; None on every rank where one of them cannot see the others'
        memory."""
        if platform.machine() not in ORDERED_STORES:
            return None
        world = len(ranks)
        size = world * FLAG_BYTES + 2 * world * SLOT_BYTES
        names: list[str | None] = [f"giantserve-{secrets.token_hex(8)}" if rank == 0 else None]
        memory = None
        if rank == 0:
            memory = _open(FOLDER / str(names[0]), size, create=True)
        dist.broadcast_object_list(names, src=ranks[0], group=group)
        path = FOLDER / str(names[0])
        if rank != 0:
            memory = _open(path, size, create=False)
        seen = torch.tensor([int(memory is not None)])
        dist.all_reduce(seen, op=dist.ReduceOp.MIN, group=group)
        if rank == 0:
            path.unlink(missing_ok=True)  # the mappings keep it alive
        return cls(memory, rank, world) if memory is not None and int(seen) else None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, of the same bits on all of them; more than two are summed in
        fp32."""
        flat = tensor.contiguous().view(-1)
        out = torch.empty_like(flat)
        step = SLOT_BYTES // flat.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            parts = self._exchange(part, [part.numel()] * self._world)
            if self._world == 2:
                torch.add(parts[0], parts[1], out=out[start : start + step])
            else:
                stacked = torch.stack(parts)
                wide = stacked.float() if stacked.is_floating_point() else stacked
                out[start : start + step] = wide.sum(0)
        return out.view(tensor.shape)

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The ranks' tensors, of those last dimensions, one after the other along it."""
        rows = math.prod(tensor.shape[:-1])  # none, where a pass needs no logits
        step = max(1, SLOT_BYTES // (max(sizes) * tensor.element_size()))
        flat = tensor.reshape(rows, tensor.shape[-1])
        out = flat.new_empty(rows, sum(sizes))
        for start in range(0, rows, step):
            part = flat[start : start + step]
            counts = [part.shape[0] * size for size in sizes]
            offset = 0
            for received, size in zip(self._exchange(part, counts), sizes, strict=True):
                out[start : start + step, offset : offset + size] = received.view(-1, size)
                offset += size
        return out.view(*tensor.shape[:-1], sum(sizes))

    def _exchange(self, part: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's part, of those element counts, as views that hold until the next exchange
        but one."""
        self._turn += 1
        slots = self._slots[self._turn % 2]
        own = slots[self._rank, : part.numel() * part.element_size()].view(part.dtype)
        own.copy_(part.reshape(-1))
        self._flags[self._rank] = self._turn
        self._wait()
        return [
            slots[rank, : count * part.element_size()].view(part.dtype)
            for rank, count in enumerate(counts)
        ]

    def _wait(self) -> None:
        flags, turn = self._flags, self._turn
        polls = 0
        while flags.min() < turn:
            polls += 1
            if polls > SPINS:
                time.sleep(NAP_S)
            elif polls % 16 == 0:
                os.sched_yield()


def _open(path: Path, size: int, *, create: bool) -> mmap.mmap | None:
    flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError:
        return None
    try:
        if create:
            os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    except OSError:
        if create:
            path.unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)
