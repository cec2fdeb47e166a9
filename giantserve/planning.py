"""From options to a plan: fill in what was left out from the machine, and ask the planner."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from giantserve.calibrate import calibrate
from giantserve.config import EngineConfig
from giantserve.errors import ConfigError
from kvcache.tier import TierBudget
from partition import Bandwidths, ClusterSpec, Constraints, ModelProfile, PartitionPlan, plan
from partition.calibration import default_cache_folder
from partition.machine import Machine

RUNTIME_BYTES = 700 << 20
"""Resident memory of a shard beside its tiers: interpreter, torch, transformers, transient
buffers."""

MEMORY_SHARE = 0.8
"""How much of the memory that is free we take when no budget is given."""

CPU_BLOCK_SIZE = 16
PAGE_MULTIPLE = 256
"""The block size on CUDA, where FlashAttention 2 takes no smaller page."""

HOST_SHARE = 0.15
"""On a machine without a GPU device and host memory are the same; how much of it backs demoted
KV."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A config with nothing left open, and what follows from it. ``bandwidths`` are one shard's
    part."""

    config: EngineConfig
    profile: ModelProfile
    bandwidths: Bandwidths
    plan: PartitionPlan


def plan_for(config: EngineConfig) -> PartitionPlan:
    """The plan that an engine with this config would run. Raises what `resolve` raises."""
    return resolve(config).plan


def resolve(config: EngineConfig) -> Resolution:
    """Decide everything that ``config`` leaves open.

    Raises ConfigError or PlanError for what cannot be honoured: an unknown model folder, a budget
    too small (the message names one that would do), an NVMe folder that cannot be written.
    """
    _check(config)
    profile = ModelProfile.from_pretrained(config.model, config.dtype, config.trust_remote_code)
    folder = _nvme_folder(config)
    machine = Machine.discover(folder)
    device = _device(config, machine)
    num_devices = _num_devices(config, machine, device)
    calibration = calibrate(folder, device, profile.dtype)
    budget = _budget(config, machine, device, num_devices)
    shared = ("disk",) if device == "cuda" else ("disk", "memory", "compute")
    cluster = ClusterSpec.local(
        num_devices,
        budget,
        calibration.bandwidths,
        calibration.link,
        shared=shared,
        staged=device == "cuda",
    )
    constraints = Constraints(
        tensor_parallel=config.tensor_parallel,
        pipeline_parallel=config.pipeline_parallel,
        expert_parallel=config.expert_parallel,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size or (PAGE_MULTIPLE if device == "cuda" else CPU_BLOCK_SIZE),
    )
    decided = plan(profile, cluster, constraints=constraints, model=config.model)
    config = replace(
        config,
        device=device,
        nvme_dir=folder,
        device_memory=budget.device_bytes,
        host_memory=budget.host_bytes,
        nvme_memory=budget.nvme_bytes,
        tensor_parallel=decided.tensor_parallel,
        pipeline_parallel=decided.pipeline_parallel,
        expert_parallel=decided.expert_parallel,
        max_model_len=decided.max_model_len,
        max_num_seqs=decided.max_num_seqs,
        max_num_batched_tokens=decided.max_num_batched_tokens,
        block_size=decided.block_size,
    )
    bandwidths = cluster.devices(len(decided.shards))[0].bandwidths
    return Resolution(config=config, profile=profile, bandwidths=bandwidths, plan=decided)


def _check(config: EngineConfig) -> None:
    if not Path(config.model).is_dir():
        raise ConfigError(
            f"{config.model} is not a folder; give the path of a downloaded checkpoint"
        )
    if config.executor not in ("local", "ray"):
        raise ConfigError(f'executor "{config.executor}" is unknown; use "local" or "ray"')
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f'device "{config.device}" is unknown; use "auto", "cpu" or "cuda"')
    for name in ("max_queued_requests", "block_size", "threads_per_shard"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _nvme_folder(config: EngineConfig) -> Path:
    folder = (config.nvme_dir or default_cache_folder() / "nvme").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"nvme_dir {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"nvme_dir {folder} is not writable; choose another, or change its rights"
        )
    return folder


def _device(config: EngineConfig, machine: Machine) -> str:
    if config.device != "auto":
        if config.device == "cuda" and not machine.gpus:
            raise ConfigError('device is "cuda", but NVML lists no GPU; use "cpu"')
        return config.device
    return "cuda" if machine.gpus else "cpu"


def _num_devices(config: EngineConfig, machine: Machine, device: str) -> int:
    """As many as the parallelism asks for; left open, every GPU, or the CPU as one device (as two
    where experts are to be dealt out)."""
    available = len(machine.gpus) if device == "cuda" else 1
    least_tensor_parallel = 2 if config.expert_parallel else 1
    tensor_parallel = config.tensor_parallel or least_tensor_parallel
    asked = tensor_parallel * (config.pipeline_parallel or 1)
    if device == "cuda" and config.executor == "local" and asked > available:
        raise ConfigError(
            f"tensor_parallel x pipeline_parallel is {asked}, but this machine has {available} GPUs"
        )
    return max(available, asked)


def _budget(config: EngineConfig, machine: Machine, device: str, num_devices: int) -> TierBudget:
    free = max(0, machine.memory_bytes - num_devices * RUNTIME_BYTES)
    share = int(free * MEMORY_SHARE) // num_devices
    if device == "cuda":
        gpu = min(gpu.free_bytes for gpu in machine.gpus)
        device_bytes, host_bytes = int(gpu * 0.9), share
    else:
        host_bytes = int(share * HOST_SHARE)
        device_bytes = share - (host_bytes if config.host_memory is None else config.host_memory)
    nvme_bytes = int(machine.free_disk_bytes * MEMORY_SHARE) // num_devices
    asked = config.device_memory, config.host_memory, config.nvme_memory
    device_bytes, host_bytes, nvme_bytes = (
        max(0, found) if given is None else given
        for given, found in zip(asked, (device_bytes, host_bytes, nvme_bytes), strict=True)
    )
    return TierBudget(device_bytes=device_bytes, host_bytes=host_bytes, nvme_bytes=nvme_bytes)
