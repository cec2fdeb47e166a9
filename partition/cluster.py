"""The machines a plan may use: nodes, their devices, budgets and bandwidths."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from kvcache.tier import TierBudget
from partition.bandwidths import RESOURCES, Bandwidths
from partition.codec import encode
from partition.errors import FieldError, PlanError
from partition.links import Link
from partition.yaml_lines import YamlDocument


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
                raise FieldError(
                    f"budget.{name}", f"{getattr(self.budget, name)} cannot be; give 0 or more"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A machine. ``shared`` names the resources ("disk", "memory", "compute") whose rates are the
    node's and are divided among the devices in use; other rates are each device's own. ``link``
    joins its devices. ``num_cores`` compute where that is shared (None: one a device in use)."""

    devices: tuple[DeviceSpec, ...]
    link: Link
    name: str = "node"
    shared: tuple[str, ...] = ("disk",)
    num_cores: int | None = None

    def __post_init__(self) -> None:
        if not self.devices:
            raise FieldError("devices", f"node {self.name} has no devices; list at least one")
        if self.num_cores is not None and self.num_cores < 1:
            raise FieldError("num_cores", f"{self.num_cores} cannot be; give at least 1")
        for resource in self.shared:
            if resource not in RESOURCES:
                raise FieldError(
                    "shared", f"{resource!r} cannot be shared; known are {', '.join(RESOURCES)}"
                )

    @property
    def device_names(self) -> tuple[str, ...]:
        """By device: its name, with its place in the node where others have the same."""
        names = [device.name for device in self.devices]
        return tuple(
            name if names.count(name) == 1 else f"{name}-{place}"
            for place, name in enumerate(names)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDevices:
    """The devices of one stage by rank, with their part of what is shared. ``group_link`` joins
    them, ``next_link`` leads to the next stage (None: this is the last). Equal where nothing but
    the names differs."""

    devices: tuple[DeviceSpec, ...]
    group_link: Link
    next_link: Link | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLink:
    """What joins two nodes, by name, where it is not the cluster's ``network``."""

    nodes: tuple[str, ...]
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """The nodes, in the order in which ranks are dealt to their devices. ``network`` joins any two
    nodes for which ``links`` has nothing else."""

    nodes: tuple[NodeSpec, ...]
    network: Link | None = None
    links: tuple[NodeLink, ...] = ()

    def __post_init__(self) -> None:
        if not self.nodes:
            raise FieldError("nodes", "the cluster has no nodes; list at least one")
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            raise FieldError(
                "nodes", f"their names are {', '.join(names)}; give each a name of its own"
            )
        if self.network is None and len(names) > 1:
            raise FieldError("network", "missing, but there are several nodes; add it")
        for index, joined in enumerate(self.links):
            where = f"links[{index}].nodes"
            unknown = [name for name in joined.nodes if name not in names]
            if unknown:
                raise FieldError(where, f"{unknown[0]} is no node; there are {', '.join(names)}")
            if len(set(joined.nodes)) != 2:
                raise FieldError(
                    where,
                    f"{', '.join(joined.nodes) or 'nothing'} cannot be joined; name two nodes",
                )

    def link(self, left: NodeSpec, right: NodeSpec) -> Link:
        """What joins devices of these nodes, which may be the same."""
        if left is right:
            return left.link
        pair = {left.name, right.name}
        found = next((joined.link for joined in self.links if set(joined.nodes) == pair), None)
        link = found or self.network
        assert link is not None
        return link

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
            ),
            network=self.network,
            links=self.links,
        )

    @classmethod
    def local(
        cls,
        num_devices: int,
        budget: TierBudget,
        bandwidths: Bandwidths,
        link: Link,
        *,
        shared: tuple[str, ...] = ("disk", "memory", "compute"),
        staged: bool = False,
        num_cores: int | None = None,
        name: str = "local",
    ) -> ClusterSpec:
        """One node of equal devices. ``budget`` is each device's; ``bandwidths`` are the machine's
        for what is ``shared`` (by default everything, as on a machine whose devices are its own
        cores)."""
        if num_devices < 1:
            raise PlanError(f"{num_devices} devices cannot hold a model; give at least 1")
        device = DeviceSpec(budget=budget, bandwidths=bandwidths, staged=staged)
        devices = tuple(replace(device, name=f"device-{i}") for i in range(num_devices))
        node = NodeSpec(devices=devices, name=name, shared=shared, link=link, num_cores=num_cores)
        return cls(nodes=(node,))

    def to_yaml(self) -> str:
        """Every number, in a form that `from_yaml` reads back."""
        return str(yaml.safe_dump(encode(self), sort_keys=False))

    @classmethod
    def from_yaml(cls, source: str | Path) -> ClusterSpec:
        """Read a cluster from a file (a Path) or from YAML text (a str).

        Raises PlanError naming the file, the line and the key.
        """
        name = str(source) if isinstance(source, Path) else None
        if isinstance(source, Path):
            try:
                source = source.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise PlanError(f"cannot read the cluster from {name}: {error}") from None
        from partition.cluster_yaml import cluster_of

        document = YamlDocument.parse(source, name)
        try:
            return cluster_of(document.values)
        except FieldError as error:
            raise PlanError(f"{document.at(error.where)}: {error}") from None
