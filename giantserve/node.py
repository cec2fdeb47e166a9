"""This machine as the planner sees one: what its devices may hold, and how fast it is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from giantserve.calibrate import calibrate
from giantserve.errors import ConfigError
from kvcache.tier import TierBudget
from partition.cache import default_cache_folder
from partition.calibration import Calibration
from partition.cluster import ClusterSpec, NodeSpec
from partition.machine import Machine

RUNTIME_BYTES = 700 << 20
"""Resident memory of a shard beside its tiers: interpreter, torch, transformers, transient
buffers."""

MEMORY_SHARE = 0.8
"""How much of the memory that is free we take when no budget is given."""

GPU_SHARE = 0.9
"""The same of a GPU's memory."""

HOST_SHARE = 0.15
"""On a machine without a GPU device and host memory are the same; how much of it backs demoted
KV."""


def nvme_folder(given: Path | None) -> Path:
    """Where weights and KV lie on NVMe, made if need be; None: in the user's cache folder.

    Raises ConfigError where it cannot be written.
    """
    folder = (given or default_cache_folder() / "nvme").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"nvme_dir {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"nvme_dir {folder} is not writable; choose another, or change its rights"
        )
    return folder


def default_budget(
    machine: Machine, device: str, num_devices: int, host_bytes: int | None = None
) -> TierBudget:
    """What each of ``num_devices`` ("cuda" or "cpu") may hold when nothing is said; ``host_bytes``
    where that much was."""
    free = max(0, machine.memory_bytes - num_devices * RUNTIME_BYTES)
    share = int(free * MEMORY_SHARE) // num_devices
    if device == "cuda":
        device_bytes = int(min(gpu.free_bytes for gpu in machine.gpus) * GPU_SHARE)
        host_bytes = share if host_bytes is None else host_bytes
    else:
        host_bytes = int(share * HOST_SHARE) if host_bytes is None else host_bytes
        device_bytes = max(0, share - host_bytes)
    nvme_bytes = int(machine.free_disk_bytes * MEMORY_SHARE) // num_devices
    return TierBudget(device_bytes=device_bytes, host_bytes=host_bytes, nvme_bytes=nvme_bytes)


def cluster_of(
    calibration: Calibration, num_devices: int, budget: TierBudget, name: str = "local"
) -> ClusterSpec:
    """A machine's devices, each with this budget; without a GPU they are its own cores."""
    on_cuda = calibration.device == "cuda"
    rates = calibration.bandwidths
    if rates.host_attention is not None:  # by the cores that all of them share
        rates = replace(rates, host_attention=rates.host_attention / num_devices)
    return ClusterSpec.local(
        num_devices,
        budget,
        rates,
        calibration.link,
        shared=("disk",) if on_cuda else ("disk", "memory", "compute"),
        staged=on_cuda,
        num_cores=None if on_cuda else os.cpu_count(),
        name=name,
    )


def discover_node(
    folder: Path,
    name: str = "local",
    *,
    refresh: bool = False,
    max_gpus: int | None = None,
    max_memory_bytes: int | None = None,
) -> tuple[Machine, Calibration, NodeSpec]:
    """Look at this machine and measure it, or take what was measured unless ``refresh``: every
    GPU is a device, or the CPU is one, up to what the limits say. Raises as `calibrate`."""
    machine = Machine.discover(folder)
    memory_bytes = min(machine.memory_bytes, max_memory_bytes or machine.memory_bytes)
    machine = replace(machine, gpus=machine.gpus[:max_gpus], memory_bytes=memory_bytes)
    device = "cuda" if machine.gpus else "cpu"
    calibration = calibrate(folder, device, refresh=refresh)
    num_devices = max(1, len(machine.gpus))
    budget = default_budget(machine, device, num_devices)
    return machine, calibration, cluster_of(calibration, num_devices, budget, name).nodes[0]
