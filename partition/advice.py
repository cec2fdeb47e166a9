"""Why the next best plans lost, and what would make the best one better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from partition.cluster import ClusterSpec, DeviceSpec, NodeSpec
from partition.errors import PlanError
from partition.plan import PartitionPlan
from partition.profile import ModelProfile
from partition.search import plan
from partition.workload import Constraints, Objective, Workload

WORTH_SAYING = 1.05
"""How much better a change must make the plan."""

MORE_HOST_BYTES = 16 << 30

SHARED_BY_TERM = {
    "disk": "disk",
    "host link": "memory",
    "device memory": "memory",
    "compute": "compute",
}
"""What devices of a node may share, by the term that waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A plan that lost. ``factor``: how good it is as a share of the best."""

    plan: PartitionPlan
    factor: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A single change of the cluster or the workload. ``factor``: how much better the best plan
    becomes."""

    what: str
    factor: float
    plan: PartitionPlan

    def __str__(self) -> str:
        return f"{self.what}: {self.factor:.2g}x"


def explain_runners_up(
    best: PartitionPlan,
    others: tuple[PartitionPlan, ...],
    cluster: ClusterSpec,
    objective: Objective = Objective.MAX_THROUGHPUT,
) -> tuple[RunnerUp, ...]:
    """The ``others`` in their order, each with one sentence of why it is worse than ``best``."""
    goodness = _goodness(objective)
    found = []
    for other in others:
        factor = goodness(other) / goodness(best)
        why = f"{factor:.2g}x: {_slowest_stage(other, cluster)}"
        if objective is Objective.LEAST_DEVICES and len(other.shards) > len(best.shards):
            why = f"{len(other.shards)} devices instead of {len(best.shards)}"
        found.append(RunnerUp(plan=other, factor=factor, why=why))
    return tuple(found)


def what_would_change(
    best: PartitionPlan,
    profile: ModelProfile,
    cluster: ClusterSpec,
    workload: Workload | None = None,
    objective: Objective = Objective.MAX_THROUGHPUT,
    constraints: Constraints | None = None,
) -> tuple[Change, ...]:
    """Plans again with single changes; those that are worth it, best first."""
    workload, goodness = workload or Workload(), _goodness(objective)
    more = {
        "16 GiB more host memory per node": _with_devices(cluster, _more_host),
        "2x host memory": _with_devices(cluster, lambda _, device: _scaled(device, "host_bytes")),
        "2x device memory": _with_devices(
            cluster, lambda _, device: _scaled(device, "device_bytes")
        ),
        "2x disk bandwidth": _with_devices(cluster, _faster_disk),
        "one more device": _with_device(cluster, best.shards[0].node),
    }
    cases = {what: (changed, workload) for what, changed in more.items()}
    doubled = replace(workload, concurrency=2 * workload.concurrency)
    cases["2x as many sequences at once"] = cluster, doubled
    changes = []
    for what, (changed, load) in cases.items():
        try:
            made = plan(profile, changed, load, objective, constraints, model=best.model)
        except PlanError:  # e.g. limits that twice the sequences cannot keep
            continue
        factor = goodness(made) / goodness(best)
        if factor >= WORTH_SAYING:
            changes.append(Change(what=what, factor=factor, plan=made))
    return tuple(sorted(changes, key=lambda change: -change.factor))


def _goodness(objective: Objective) -> Callable[[PartitionPlan], float]:
    """The larger, the better the plan."""
    if objective is Objective.MIN_TPOT:
        return lambda made: 1 / made.forecast.time_per_output_token_s
    if objective is Objective.MIN_TTFT:
        return lambda made: 1 / made.forecast.time_to_first_token_s
    return lambda made: made.forecast.tokens_per_s


def _slowest_stage(made: PartitionPlan, cluster: ClusterSpec) -> str:
    """What the slowest stage waits for, and with whom it shares that."""
    forecast = made.forecast
    stage = max(range(len(made.stages)), key=lambda index: forecast.stage_times_s[index])
    waits = (
        f"stage {stage} waits for the {forecast.binds} ({forecast.terms_s[forecast.binds]:.2g} s)"
    )
    home = next(node for node in cluster.nodes if node.name == made.stages[stage].shards[0].node)
    busy = made.stages if made.passes_in_flight > 1 else (made.stages[stage],)
    users = sum(shard.node == home.name for each in busy for shard in each.shards)
    if users > 1 and SHARED_BY_TERM.get(forecast.binds) in home.shared:
        return f"{waits}, which {users} devices of {home.name} share"
    return waits


def _with_devices(
    cluster: ClusterSpec, change: Callable[[NodeSpec, DeviceSpec], DeviceSpec]
) -> ClusterSpec:
    return replace(
        cluster,
        nodes=tuple(
            replace(node, devices=tuple(change(node, device) for device in node.devices))
            for node in cluster.nodes
        ),
    )


def _with_device(cluster: ClusterSpec, name: str) -> ClusterSpec:
    """One more device like its last on the named node."""
    return replace(
        cluster,
        nodes=tuple(
            replace(node, devices=(*node.devices, node.devices[-1])) if node.name == name else node
            for node in cluster.nodes
        ),
    )


def _more_host(node: NodeSpec, device: DeviceSpec) -> DeviceSpec:
    host_bytes = device.budget.host_bytes + MORE_HOST_BYTES // len(node.devices)
    return replace(device, budget=replace(device.budget, host_bytes=host_bytes))


def _scaled(device: DeviceSpec, field: str) -> DeviceSpec:
    doubled = {field: 2 * getattr(device.budget, field)}
    return replace(device, budget=replace(device.budget, **doubled))


def _faster_disk(node: NodeSpec, device: DeviceSpec) -> DeviceSpec:
    doubled = device.bandwidths.shared_by(0.5, ("disk",))  # a share of two disks
    return replace(device, bandwidths=doubled)
