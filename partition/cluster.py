"""The machines a plan may use: nodes, their devices, budgets and bandwidths."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from kvcache.tier import TierBudget
from partition.bandwidths import RESOURCES, Bandwidths
from partition.codec import decode
from partition.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One device, which runs one shard: the bytes that shard may hold, and how fast they move.

    ``staged``: NVMe reads reach it through two buffers of the host budget (CUDA), not directly.
    """

    budget: TierBudget
    bandwidths: Bandwidths
    name: str = field(default="device", compare=False)
    staged: bool = False

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes", "nvme_bytes"):
            if getattr(self.budget, name) < 0:
                raise PlanError(
                    f"budget.{name} is {getattr(self.budget, name)}; it must be 0 or more"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A machine. ``shared`` names the resources ("disk", "memory", "compute") whose rates are the
    node's and are divided among the devices in use; other rates are each device's own."""

    devices: tuple[DeviceSpec, ...]
    name: str = "node"
    shared: tuple[str, ...] = ("disk",)

    def __post_init__(self) -> None:
        if not self.devices:
            raise PlanError(f"node {self.name} has no devices; list at least one")
        for resource in self.shared:
            if resource not in RESOURCES:
                raise PlanError(f"shared names {resource!r}; known are {', '.join(RESOURCES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """The nodes, in the order in which ranks are dealt to their devices."""

    nodes: tuple[NodeSpec, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise PlanError("the cluster has no nodes; list at least one")

    @property
    def num_devices(self) -> int:
        return sum(len(node.devices) for node in self.nodes)

    def devices(self, count: int) -> tuple[DeviceSpec, ...]:
        """The first ``count`` devices, each with its part of what its node shares among those in
        use."""
        chosen: list[DeviceSpec] = []
        for node in self.nodes:
            used = node.devices[: count - len(chosen)]
            chosen += [
                replace(device, bandwidths=device.bandwidths.shared_by(len(used), node.shared))
                for device in used
            ]
        return tuple(chosen)

    def with_floor(self, **floor_bytes: int) -> ClusterSpec:
        """This cluster with every device's budgets raised to at least those given by name."""

        def raised(device: DeviceSpec) -> DeviceSpec:
            changes = {
                name: max(getattr(device.budget, name), floor)
                for name, floor in floor_bytes.items()
            }
            return replace(device, budget=replace(device.budget, **changes))

        return ClusterSpec(
            nodes=tuple(
                replace(node, devices=tuple(raised(device) for device in node.devices))
                for node in self.nodes
            )
        )

    @classmethod
    def local(
        cls,
        num_devices: int,
        budget: TierBudget,
        bandwidths: Bandwidths,
        *,
        shared: tuple[str, ...] = ("disk", "memory", "compute"),
        staged: bool = False,
    ) -> ClusterSpec:
        """One node of equal devices. ``budget`` is each device's; ``bandwidths`` are the machine's
        for what is ``shared`` (by default everything, as on a machine whose devices are its own
        cores)."""
        if num_devices < 1:
            raise PlanError(f"{num_devices} devices cannot hold a model; give at least 1")
        device = DeviceSpec(budget=budget, bandwidths=bandwidths, staged=staged)
        devices = tuple(replace(device, name=f"device-{i}") for i in range(num_devices))
        return cls(nodes=(NodeSpec(devices=devices, name="local", shared=shared),))

    @classmethod
    def from_yaml(cls, source: str | Path) -> ClusterSpec:
        """Read a cluster from a file (a Path) or from YAML text (a str).

        Raises PlanError naming the key, or the line where the text is no YAML.
        """
        if isinstance(source, Path):
            try:
                source = source.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise PlanError(f"cannot read the cluster from {source}: {error}") from None
        try:
            data = yaml.safe_load(source)
        except yaml.YAMLError as error:
            raise PlanError(f"the cluster is not YAML: {' '.join(str(error).split())}") from None
        return decode(cls, data)
