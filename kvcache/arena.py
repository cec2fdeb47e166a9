"""A byte-capped pool of memory on one tier. The only place that allocates weights and KV."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass

import torch

from kvcache.errors import TierFullError
from kvcache.tier import Tier

ALIGNMENT = 4096
"""Bytes. What O_DIRECT asks of an address, and the size of a page."""

_HUGE_PAGE = 2 << 20


@dataclass(slots=True)
class _Block:
    """``num_bytes`` are counted. ``memory`` is its mapping, where ``offset`` is where it begins;
    None for what is CUDA's or lies in another arena's."""

    num_bytes: int
    memory: mmap.mmap | None
    pinned: bool
    offset: int = 0


class Arena:
    """Hands out byte tensors of one tier and refuses to pass ``capacity_bytes``.

    CPU memory is anonymous, page aligned, zeroed and untouched until written; it goes back to the
    operating system at `release`. The HOST arena is page-locked where there is a CUDA device.
    Thread-safe.
    """

    def __init__(self, tier: Tier, capacity_bytes: int, device: torch.device | None = None) -> None:
        """``device`` is where the bytes lie: the compute device for DEVICE; the CPU otherwise."""
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it must be 0 or more")
        if tier is Tier.NVME:
            raise ValueError("an arena holds memory: NVMe bytes belong to a store of files")
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.device = torch.device("cpu") if device is None else device
        self._lock = threading.Lock()
        self._blocks: dict[int, _Block] = {}
        self._used = 0
        self._peak = 0

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever in use at once."""
        return self._peak

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self._used

    def allocate(self, num_bytes: int, alignment: int = ALIGNMENT) -> torch.Tensor:
        """A uint8 tensor of ``num_bytes``, its address a multiple of ``alignment`` (at most a
        page).

        Counts ``num_bytes`` rounded up to whole pages. The caller gives it back with `release`.
        Raises TierFullError past the capacity.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes is {num_bytes}; it must be 0 or more")
        if alignment <= 0 or ALIGNMENT % alignment:
            raise ValueError(f"alignment is {alignment}; it must divide {ALIGNMENT}")
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return self._allocate(num_bytes, 0)[:num_bytes]

    def allocate_with(self, num_bytes: int, other: Arena, other_bytes: int) -> torch.Tensor:
        """CPU memory in one piece: ``num_bytes`` of this arena, followed by ``other_bytes``, which
        ``other`` counts. It stays until this one closes.

        Raises TierFullError where one of them is full.
        """
        tensor = self._allocate(num_bytes, other_bytes)
        try:
            other._count(tensor[num_bytes:], _Block(_whole_pages(other_bytes), None, False))
        except TierFullError:
            self.release(tensor)
            raise
        return tensor

    def release(self, tensor: torch.Tensor) -> None:
        """Take back what `allocate` gave. Views that outlive it read zeros, or hold CUDA memory
        alive.

        Raises ValueError for a tensor that is not this arena's, or was released before.
        """
        if tensor.numel() == 0:
            return
        with self._lock:
            block = self._blocks.pop(tensor.data_ptr(), None)
            if block is None:
                raise ValueError("the tensor is not this arena's, or was released before")
            self._free(tensor.data_ptr(), block)
            self._used -= block.num_bytes

    def discard(self, view: torch.Tensor) -> None:
        """Give back the pages that lie wholly within ``view``, a part of an allocation, which reads
        zeros from then on. The count stays: something else now stands for these bytes. Does nothing
        on CUDA.
        """
        with self._lock:
            for address, block in self._blocks.items():
                offset = view.data_ptr() - address
                if block.memory is not None and 0 <= offset < block.num_bytes:
                    end = (offset + view.nbytes) // ALIGNMENT * ALIGNMENT
                    start = -(-offset // ALIGNMENT) * ALIGNMENT
                    if end > start:
                        begin = block.offset + start
                        block.memory.madvise(mmap.MADV_DONTNEED, begin, end - start)
                    return

    def close(self) -> None:
        """Release whatever is still held. Idempotent."""
        with self._lock:
            for address, block in self._blocks.items():
                self._free(address, block)
            self._blocks.clear()
            self._used = 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless the counters agree with the blocks."""
        with self._lock:
            held = sum(block.num_bytes for block in self._blocks.values())
            assert held == self._used <= self._peak <= self.capacity_bytes, (held, self._used)

    def _allocate(self, num_bytes: int, other_bytes: int) -> torch.Tensor:
        """Also maps ``other_bytes`` behind, uncounted."""
        with self._lock:
            self._check_room(_whole_pages(num_bytes))
            tensor, block = self._new_block(_whole_pages(num_bytes + other_bytes))
            block.num_bytes = _whole_pages(num_bytes)
            self._keep(tensor, block)
        return tensor[: num_bytes + other_bytes]

    def _count(self, tensor: torch.Tensor, block: _Block) -> None:
        with self._lock:
            self._check_room(block.num_bytes)
            self._keep(tensor, block)

    def _check_room(self, num_bytes: int) -> None:
        free = self.capacity_bytes - self._used
        if num_bytes > free:
            raise TierFullError(self.tier, num_bytes, free, self.capacity_bytes)

    def _keep(self, tensor: torch.Tensor, block: _Block) -> None:
        self._blocks[tensor.data_ptr()] = block
        self._used += block.num_bytes
        self._peak = max(self._peak, self._used)

    def _new_block(self, num_bytes: int) -> tuple[torch.Tensor, _Block]:
        if self.device.type != "cpu":
            tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            return tensor, _Block(num_bytes, None, False)
        # a disk reads slower into small pages, so a large block begins with a huge one
        huge = num_bytes // _HUGE_PAGE * _HUGE_PAGE
        spare = _HUGE_PAGE if huge else 0
        memory = mmap.mmap(-1, num_bytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        offset = -tensor.data_ptr() % _HUGE_PAGE if huge else 0
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE, offset, huge)
        tensor = tensor[offset : offset + num_bytes]
        pinned = self.tier is Tier.HOST and torch.cuda.is_available()
        if pinned:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            error = runtime.cudaHostRegister(tensor.data_ptr(), num_bytes, 0)
            torch.cuda.check_error(int(error))
        return tensor, _Block(num_bytes, memory, pinned, offset)

    def _free(self, address: int, block: _Block) -> None:
        if block.pinned:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(int(runtime.cudaHostUnregister(address)))
        if block.memory is not None:
            # The mapping lives until the last view of it does; its pages need not.
            block.memory.madvise(mmap.MADV_DONTNEED)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
