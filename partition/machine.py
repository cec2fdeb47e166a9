"""What this machine has, without loading torch: CPUs, memory, GPUs, free disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as NVML sees it. ``link`` is the generation and width of its PCIe at most, and its
    NVLinks that are up; "" where NVML does not say."""

    name: str
    total_bytes: int
    free_bytes: int
    link: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``memory_bytes`` are what a process started now could take: ``available_bytes`` of the
    ``total_bytes``, or less where a cgroup says so. ``num_cpus`` are those it may use."""

    num_cpus: int
    num_numa_nodes: int
    total_bytes: int
    available_bytes: int
    memory_bytes: int
    free_disk_bytes: int
    gpus: tuple[Gpu, ...]

    @classmethod
    def discover(cls, folder: Path) -> Machine:
        """Look at this machine; ``folder`` (or the nearest parent that exists) says which disk.

        Takes milliseconds; measures nothing.
        """
        memory = psutil.virtual_memory()
        return cls(
            num_cpus=len(os.sched_getaffinity(0)),
            num_numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
            total_bytes=memory.total,
            available_bytes=memory.available,
            memory_bytes=available_memory_bytes(),
            free_disk_bytes=free_disk_bytes(folder),
            gpus=nvml_gpus(),
        )


def free_disk_bytes(folder: Path) -> int:
    """Bytes that this user may still write below ``folder`` or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def available_memory_bytes(root: Path = Path("/")) -> int:
    """The least of MemAvailable and what each cgroup (v1 or v2) above this process leaves.

    ``root`` is where ``proc`` and ``sys`` are mounted.
    """
    available = _UNLIMITED
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min([available, *_cgroup_rooms(root)])


def _cgroup_rooms(root: Path) -> list[int]:
    """Limit minus use (page cache that can be dropped not counted) of every limited group above
    us."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms: list[int] = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = (
                "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        top = root / mount
        group = top / path.lstrip("/")
        # in a container the path may be the host's, and the mount already ours
        for folder in dict.fromkeys((group, *group.parents, top)):
            if folder == top or top in folder.parents:
                rooms += _room(folder, *names)
    return rooms


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> list[int]:
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return []
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, int(limit) - usage + int(stat.get(cache_name, 0)))]


def nvml_gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVML lists; none where there is no driver or no nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        name=str(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        link=", ".join([*_pcie(handle), *_nvlinks(handle)]),
    )


def _pcie(handle: Any) -> list[str]:
    """At most: what is in use falls while the GPU idles."""
    import pynvml

    try:
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        return [f"PCIe {generation} x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)}"]
    except pynvml.NVMLError:
        return []


def _nvlinks(handle: Any) -> list[str]:
    import pynvml

    up = 0
    for place in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            up += pynvml.nvmlDeviceGetNvLinkState(handle, place)
        except pynvml.NVMLError:
            break
    return [f"{up} NVLinks"] if up else []
