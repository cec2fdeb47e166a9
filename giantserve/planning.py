"""From options to a plan: fill in what was left out from the machine, and ask the planner."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from giantserve.calibrate import calibrate
from giantserve.config import EngineConfig
from giantserve.errors import ConfigError
from giantserve.executor.launcher import run_beside
from giantserve.node import cluster_of, default_budget, nvme_folder
from giantserve.stored_files import stored_bytes
from kvcache.tier import TierBudget
from partition import (
    Bandwidths,
    ClusterSpec,
    Constraints,
    ModelProfile,
    Objective,
    PartitionPlan,
    Workload,
)
from partition.byte_size import format_bytes
from partition.machine import Machine
from partition.problem import PlanningProblem
from partition.profile_cache import known_or_made

CPU_BLOCK_SIZE = 16
PAGE_MULTIPLE = 256
"""The block size on CUDA, where FlashAttention 2 takes no smaller page."""

CLUSTER_SAYS = (
    "device",
    "device_memory",
    "host_memory",
    "nvme_memory",
    "nvme_dir",
    "threads_per_shard",
)
"""The options of which a cluster file leaves nothing open."""

WORKLOAD = tuple(field.name for field in fields(Workload))


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
    config, problem = _here(config)
    decided = problem.plan()
    config = replace(
        config,
        tensor_parallel=decided.tensor_parallel,
        pipeline_parallel=decided.pipeline_parallel,
        expert_parallel=decided.expert_parallel,
        max_model_len=decided.max_model_len,
        max_num_seqs=decided.max_num_seqs,
        max_num_batched_tokens=decided.max_num_batched_tokens,
        block_size=decided.block_size,
    )
    bandwidths = problem.cluster.devices(len(decided.shards))[0].bandwidths
    return Resolution(config=config, profile=problem.profile, bandwidths=bandwidths, plan=decided)


def problem_here(config: EngineConfig) -> PlanningProblem:
    """What the planner is asked for an engine on this machine. Raises what `resolve` raises."""
    return _here(config)[1]


def problem_on(cluster: ClusterSpec, config: EngineConfig) -> PlanningProblem:
    """What the planner is asked for an engine on ``cluster``, of which nothing need exist: nothing
    is measured or loaded, and the model may be a folder with no more than its config.json.

    Raises ConfigError for an option that says what the cluster says.
    """
    check(config)
    for name in CLUSTER_SAYS:
        if getattr(config, name) not in (None, "auto"):
            raise ConfigError(
                f"{name} is {getattr(config, name)}, but memory and devices are what the cluster "
                f"file says; leave {name} out, or change the file"
            )
    cuda = any(device.staged for node in cluster.nodes for device in node.devices)
    return _problem(config, cluster, "cuda" if cuda else "cpu")


def _here(config: EngineConfig) -> tuple[EngineConfig, PlanningProblem]:
    """The config with its memory and device filled in from this machine, and the problem."""
    check(config)
    folder = nvme_folder(config.nvme_dir)
    machine = Machine.discover(folder)
    stored = stored_bytes(folder, Path(config.model))  # by an earlier run, which this one goes on
    machine = replace(machine, free_disk_bytes=machine.free_disk_bytes + stored)
    device = _device(config, machine)
    num_devices = _num_devices(config, machine, device)
    profile = _profile(config)
    calibration = calibrate(folder, device, profile.dtype)
    budget = _budget(config, machine, device, num_devices)
    if config.prefix_memory is not None and config.prefix_memory > budget.nvme_bytes:
        raise ConfigError(
            f"prefix_memory is {format_bytes(config.prefix_memory)}, but a shard may use "
            f"{format_bytes(budget.nvme_bytes)} of the disk of {folder}; lower prefix_memory, "
            "raise nvme_memory or give another nvme_dir"
        )
    cluster = cluster_of(calibration, num_devices, budget)
    backend = config.storage_backend
    config = replace(
        config,
        storage_backend=calibration.storage_backend if backend == "auto" else backend,
        device=device,
        nvme_dir=folder,
        device_memory=budget.device_bytes,
        host_memory=budget.host_bytes,
        nvme_memory=budget.nvme_bytes,
    )
    return config, _problem(config, cluster, device, profile)


def _profile(config: EngineConfig) -> ModelProfile:
    given = config.model, config.dtype, config.trust_remote_code
    return known_or_made(*given, lambda: run_beside(ModelProfile.from_pretrained, *given))


def _problem(
    config: EngineConfig,
    cluster: ClusterSpec,
    device: str,
    profile: ModelProfile | None = None,
) -> PlanningProblem:
    load = {name: getattr(config, name) for name in WORKLOAD}
    return PlanningProblem(
        model=config.model,
        profile=profile or _profile(config),
        cluster=cluster,
        workload=Workload(**{name: value for name, value in load.items() if value is not None}),
        objective=_objective(config),
        constraints=Constraints(
            tensor_parallel=config.tensor_parallel,
            pipeline_parallel=config.pipeline_parallel,
            expert_parallel=config.expert_parallel,
            layer_split=config.layer_split,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=config.block_size or (PAGE_MULTIPLE if device == "cuda" else CPU_BLOCK_SIZE),
            kv_storage_dtypes=tuple(name.strip() for name in config.kv_storage_dtype.split(",")),
            prefix_memory=config.prefix_memory,
        ),
    )


def _objective(config: EngineConfig) -> Objective:
    known = {objective.value: objective for objective in Objective}
    if config.objective is None:
        return Objective.MAX_THROUGHPUT
    if config.objective not in known:
        raise ConfigError(
            f"objective is {config.objective!r}; there are {', '.join(sorted(known))}"
        )
    return known[config.objective]


def check(config: EngineConfig) -> None:
    """Raise ConfigError for what is wrong whatever the machine and the model are."""
    if not Path(config.model).is_dir():
        raise ConfigError(
            f"{config.model} is not a folder; give the path of a downloaded checkpoint"
        )
    if config.executor not in ("local", "ray"):
        raise ConfigError(f'executor "{config.executor}" is unknown; use "local" or "ray"')
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f'device "{config.device}" is unknown; use "auto", "cpu" or "cuda"')
    if config.storage_backend not in ("auto", "posix", "deepnvme"):
        raise ConfigError(
            f'storage_backend "{config.storage_backend}" is unknown; use "auto", "posix" or '
            '"deepnvme"'
        )
    if not 0 < config.tenant_prefix_share <= 1:
        raise ConfigError(
            f"tenant_prefix_share is {config.tenant_prefix_share}; it must be above 0 and at most 1"
        )
    for name in ("max_queued_requests", "block_size", "threads_per_shard"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


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
    stages = config.pipeline_parallel or len(config.layer_split or (1,))
    asked = tensor_parallel * stages
    if device == "cuda" and config.executor == "local" and asked > available:
        raise ConfigError(
            f"tensor_parallel x pipeline_parallel is {asked}, but this machine has {available} GPUs"
        )
    return max(available, asked)


def _budget(config: EngineConfig, machine: Machine, device: str, num_devices: int) -> TierBudget:
    usual = default_budget(machine, device, num_devices, config.host_memory)
    return TierBudget(
        device_bytes=_given(config.device_memory, usual.device_bytes),
        host_bytes=usual.host_bytes,
        nvme_bytes=_given(config.nvme_memory, usual.nvme_bytes),
    )


def _given(asked: int | None, usual: int) -> int:
    return usual if asked is None else asked
