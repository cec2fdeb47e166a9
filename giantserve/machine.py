"""What this machine has, without loading torch: CPUs, memory, cgroup limit, GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_V2 = Path("/sys/fs/cgroup/memory.max")
CGROUP_V1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
UNLIMITED_BYTES = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """One CUDA device as NVML sees it. ``link`` is the PCIe generation and width in use."""

    name: str
    total_bytes: int
    free_bytes: int
    link: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``cgroup_bytes`` is None without a limit; ``usable_bytes`` may still be taken."""

    num_cpus: int
    total_bytes: int
    available_bytes: int
    cgroup_bytes: int | None
    gpus: tuple[GPU, ...]

    @property
    def usable_bytes(self) -> int:
        limit = self.available_bytes if self.cgroup_bytes is None else self.cgroup_bytes
        return min(self.available_bytes, limit)


def look_at_machine() -> Machine:
    """Ask the system. Takes milliseconds; measures nothing."""
    memory = psutil.virtual_memory()
    return Machine(
        num_cpus=len(os.sched_getaffinity(0)),
        total_bytes=memory.total,
        available_bytes=memory.available,
        cgroup_bytes=read_cgroup_limit((CGROUP_V2, CGROUP_V1)),
        gpus=_gpus(),
    )


def read_cgroup_limit(files: tuple[Path, ...]) -> int | None:
    """The memory limit in the first of ``files`` that there is; None for no limit."""
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        limit = int(text) if text.isdigit() else UNLIMITED_BYTES
        return limit if limit < UNLIMITED_BYTES else None
    return None


def _gpus() -> tuple[GPU, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> GPU:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        generation = pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)
        link = f"PCIe {generation} x{pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)}"
    except pynvml.NVMLError:
        link = "link unknown"
    return GPU(name=str(name), total_bytes=memory.total, free_bytes=memory.free, link=link)
