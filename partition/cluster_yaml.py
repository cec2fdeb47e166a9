"""The form in which people write a cluster, made into a `ClusterSpec`.

It is the dataclasses' own form, where ``hardware`` may stand for numbers and ``count``, ``nodes``,
``host_memory`` and ``nvme`` for repetition. What is written beside ``hardware`` overrides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from partition.cluster import ClusterSpec, DeviceSpec, NodeLink, NodeSpec
from partition.codec import decode, encode, expect, known_keys
from partition.errors import FieldError, PlanError
from partition.hardware import DRIVE_SHARE, Accelerator, accelerator, drive, link
from partition.links import Link

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_COUNT = 10_000
UNUSED_DRIVE = "Gen3 x4"
"""Whose rates a node without ``nvme`` gets: its budget there is 0, so that nothing is read."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drives:
    """The equal drives of a node. ``capacity`` is a drive's, in bytes; ``read`` and ``write`` are
    what one reaches, in bytes/s, where the library's rates are not meant."""

    capacity: int
    hardware: str | None = None
    count: int = 1
    read: float | None = None
    write: float | None = None

    def __post_init__(self) -> None:
        _check_count(self.count, "count")
        if self.capacity < 0:
            raise FieldError("capacity", f"{self.capacity} cannot be; give 0 or more")
        for name in ("read", "write"):
            value = getattr(self, name)
            if value is None and self.hardware is None:
                raise FieldError(name, "missing; add it, or hardware")
            if value is not None and value <= 0:
                raise FieldError(name, f"{value} cannot be; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroup:
    """``count`` equal devices; the keys of a `DeviceSpec` stand beside."""

    hardware: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        _check_count(self.count, "count")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """``nodes`` equal nodes. ``host_memory``, in bytes, and the drives are one node's, and are
    divided among its devices. ``link``, and ``devices`` or the keys of one device, stand beside."""

    name: str | None = None
    nodes: int = 1
    host_memory: int | None = None
    nvme: Drives | None = None
    shared: tuple[str, ...] = ("disk",)
    num_cores: int | None = None

    def __post_init__(self) -> None:
        _check_count(self.nodes, "nodes")
        if self.host_memory is not None and self.host_memory < 0:
            raise FieldError("host_memory", f"{self.host_memory} cannot be; give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkName:
    """A link by name; between nodes, each has ``ports`` of it. The keys of a `Link` stand
    beside."""

    hardware: str | None = None
    ports: int | None = None

    def __post_init__(self) -> None:
        if self.ports is not None:
            _check_count(self.ports, "ports")


def cluster_of(data: Any) -> ClusterSpec:
    """The cluster that these plain values describe. Raises FieldError with the path of what is
    wrong."""
    known_keys(data, "", _names(ClusterSpec))
    nodes: list[NodeSpec] = []
    for where, entry in _items(data, "nodes"):
        nodes += _nodes(entry, where, len(nodes))
    network = data.get("network")
    return ClusterSpec(
        nodes=tuple(nodes),
        network=None if network is None else _link(network, "network", between_nodes=True),
        links=tuple(
            _node_link(entry, where) for where, entry in _items(data, "links", required=False)
        ),
    )


def _nodes(data: Any, where: str, num_before: int) -> list[NodeSpec]:
    """The nodes of an entry, before which stand ``num_before``."""
    known_keys(data, where, (*_names(NodeGroup), "link", "devices", *INLINE))
    group = decode(NodeGroup, _part(data, _names(NodeGroup)), where)
    kinds = _device_entries(data, where)
    counts = [decode(DeviceGroup, _part(kind, _names(DeviceGroup)), path) for path, kind in kinds]
    num_devices = sum(each.count for each in counts)
    devices: tuple[DeviceSpec, ...] = ()
    for (path, kind), each in zip(kinds, counts, strict=True):
        known = _library(accelerator, each.hardware, f"{path}.hardware")
        devices += (_device(kind, path, known, group, where, num_devices),) * each.count
    usual = {accelerator(each.hardware).link if each.hardware else None for each in counts}
    joined = data.get("link", usual.pop() if len(usual) == 1 else None)
    if joined is None:
        raise FieldError(f"{where}.link", "missing; add what joins the devices of the node")
    link_within = _link(joined, f"{where}.link")
    try:
        node = NodeSpec(
            devices=devices, link=link_within, shared=group.shared, num_cores=group.num_cores
        )
    except FieldError as error:
        raise error.below(where) from None
    name, first = (group.name, 0) if group.name else ("node", num_before)
    if group.name and group.nodes == 1:
        return [replace(node, name=name)]
    return [replace(node, name=f"{name}-{first + index}") for index in range(group.nodes)]


def _device_entries(data: dict[str, Any], where: str) -> list[tuple[str, Any]]:
    """A node's kinds of devices, each with its path: listed, or one in the node's own keys."""
    inline = _part(data, INLINE)
    if "devices" not in data:
        if not inline:
            raise FieldError(f"{where}.devices", "missing; add it, or hardware and count")
        return [(where, inline)]
    if inline:
        raise FieldError(f"{where}.{next(iter(inline))}", "stands beside devices; put it there")
    kinds = _items(data, "devices", where)
    for path, kind in kinds:
        known_keys(kind, path, ("name", *INLINE))
    if not kinds:
        raise FieldError(f"{where}.devices", "the node has no devices; list at least one")
    return kinds


def _device(
    kind: dict[str, Any],
    path: str,
    known: Accelerator | None,
    group: NodeGroup,
    node: str,
    num_devices: int,
) -> DeviceSpec:
    """One device: what is written, over the library's, over its part of what the node has."""
    budget: dict[str, Any] = {"nvme_bytes": 0}
    rates: dict[str, Any] = {}
    if group.host_memory is not None:
        budget["host_bytes"] = group.host_memory // num_devices
    if known is not None:
        budget["device_bytes"] = known.usable_bytes
        rates = encode(known.bandwidths(drive(UNUSED_DRIVE)))
    if group.nvme is not None:
        drives = group.nvme
        kept = _library(drive, drives.hardware, f"{node}.nvme.hardware")
        budget["nvme_bytes"] = drives.count * drives.capacity // num_devices
        for name in ("read", "write"):
            one = getattr(drives, name) or DRIVE_SHARE * getattr(kept, name)
            rates[f"disk_{name}"] = drives.count * one
    usual: dict[str, Any] = {"budget": budget} | ({"bandwidths": rates} if rates else {})
    if known is not None:
        usual |= {"name": kind["hardware"], "staged": True}
    written = _over(usual, _part(kind, _names(DeviceSpec)))
    lacks = isinstance(written["budget"], dict) and "host_bytes" not in written["budget"]
    if known is not None and lacks:
        raise FieldError(f"{node}.host_memory", "missing; add what the devices may use together")
    return decode(DeviceSpec, written, path)


def _node_link(data: Any, where: str) -> NodeLink:
    known_keys(data, where, _names(NodeLink))
    if "link" not in data:
        raise FieldError(f"{where}.link", "missing; add what joins the nodes")
    link_between = _link(data["link"], f"{where}.link", between_nodes=True)
    return decode(NodeLink, data | {"link": encode(link_between)}, where)


def _link(data: Any, where: str, *, between_nodes: bool = False) -> Link:
    """A link by its name, or a map of numbers that may name one, which they override."""
    path = where if isinstance(data, str) else f"{where}.hardware"
    data = {"hardware": data} if isinstance(data, str) else data
    own = _names(LinkName) if between_nodes else ("hardware",)
    known_keys(data, where, (*own, *_names(Link)))
    name = decode(LinkName, _part(data, own), where)
    known = _library(link, name.hardware, path)
    found = decode(Link, (encode(known) if known else {}) | _part(data, _names(Link)), where)
    ports = name.ports or (1 if between_nodes and known else None)
    if ports is None or "all_reduce_bandwidth" in data:
        return found
    return replace(found, all_reduce_bandwidth=ports * found.bandwidth)


def _library(find: Callable[[str], T], name: str | None, where: str) -> T | None:
    try:
        return None if name is None else find(name)
    except PlanError as error:
        raise FieldError(where, str(error)) from None


def _items(
    data: dict[str, Any], key: str, where: str = "", *, required: bool = True
) -> list[tuple[str, Any]]:
    """The list under ``key``, each item with its path."""
    path = f"{where}.{key}" if where else key
    if key not in data:
        if required:
            raise FieldError(path, "missing; add it")
        return []
    expect(isinstance(data[key], list), path, "a list", data[key])
    return [(f"{path}[{index}]", item) for index, item in enumerate(data[key])]


def _over(usual: Any, written: Any) -> Any:
    """``written``, and what maps in it leave out from ``usual``."""
    if not (isinstance(usual, dict) and isinstance(written, dict)):
        return written
    return usual | {key: _over(usual.get(key), value) for key, value in written.items()}


def _names(kind: type[DataclassInstance]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _part(data: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: data[name] for name in names if name in data}


def _check_count(count: int, name: str) -> None:
    if not 1 <= count <= MAX_COUNT:
        raise FieldError(name, f"{count} cannot be; give 1 to {MAX_COUNT}")


INLINE = (*_names(DeviceGroup), *(name for name in _names(DeviceSpec) if name != "name"))
"""The keys of a device that may stand in a node whose devices are equal."""
