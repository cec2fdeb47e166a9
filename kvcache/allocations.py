"""What one owner took from the arenas of its tiers, given back together."""

from __future__ import annotations

import threading

import torch

from kvcache.arena import Arena


class Allocations:
    """Thread-safe, like the arenas."""

    def __init__(self, device: Arena, host: Arena) -> None:
        self._device = device
        self._host = host
        self._lock = threading.Lock()
        self._owned: list[tuple[Arena, torch.Tensor]] = []

    def on_device(self, num_bytes: int) -> torch.Tensor:
        """As `Arena.allocate`."""
        return self._take(self._device, num_bytes)

    def on_host(self, num_bytes: int) -> torch.Tensor:
        """As `Arena.allocate`."""
        return self._take(self._host, num_bytes)

    def scratch(self, num_bytes: int) -> torch.Tensor:
        """CPU memory for a while, from whichever arena has room for it."""
        fits_host = num_bytes <= self._host.free_bytes
        on_cpu = self._device.device.type == "cpu"
        return self._take(self._device if on_cpu and not fits_host else self._host, num_bytes)

    def free(self, buffer: torch.Tensor) -> None:
        """Give one of them back."""
        with self._lock:
            index = next(i for i, (_, owned) in enumerate(self._owned) if owned is buffer)
            arena, _ = self._owned.pop(index)
        arena.release(buffer)

    def close(self) -> None:
        """Give the rest back. Idempotent."""
        with self._lock:
            owned, self._owned = self._owned, []
        for arena, buffer in owned:
            arena.release(buffer)

    def check_integrity(self) -> None:
        """As `Arena.check_integrity`, of both."""
        self._device.check_integrity()
        self._host.check_integrity()

    def _take(self, arena: Arena, num_bytes: int) -> torch.Tensor:
        buffer = arena.allocate(num_bytes)
        with self._lock:
            self._owned.append((arena, buffer))
        return buffer
