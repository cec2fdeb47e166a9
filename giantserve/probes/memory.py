"""How fast a device reads its memory, and host memory reaches it and back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from giantserve.probes.timing import seconds_of

BUFFER_BYTES = 256 << 20
"""Several times what the caches hold."""


class MemoryRates(NamedTuple):
    """Bytes/s. Without a GPU the link is a copy within memory, made by the CPU."""

    read: float
    to_device: float
    to_host: float


def probe_memory(device: str) -> MemoryRates:
    """Measure in about 1 s."""
    on_cuda = device.startswith("cuda")
    host = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, pin_memory=on_cuda)
    held = host.to(device, copy=True)
    read_s = seconds_of(held.sum, device)
    to_device_s = seconds_of(lambda: held.copy_(host, non_blocking=True), device)
    to_host_s = seconds_of(lambda: host.copy_(held, non_blocking=True), device)
    return MemoryRates(
        read=BUFFER_BYTES / read_s,
        to_device=BUFFER_BYTES / to_device_s,
        to_host=BUFFER_BYTES / to_host_s,
    )
