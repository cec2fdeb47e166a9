"""The devices of a cluster as a planner sees them: equal ones taken together, dealt out to
stages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice

from partition.cluster import ClusterSpec, DeviceSpec, NodeSpec, StageDevices
from partition.links import Link

MAX_MIXED_GROUPS = 64
"""How many ways to put a stage together from unequal devices are tried at most."""

Group = tuple[int, ...]
"""The devices of one stage: the class of each rank's device, rising."""

Sequence = tuple[Group, ...]
"""The groups of all stages, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """Equal devices of one node. ``members`` are their places in the node."""

    node: int
    device: DeviceSpec
    members: tuple[int, ...]


class DevicePool:
    """The classes of a cluster's devices, and every `StageDevices` made of them under a number:
    equal ones have the same."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self.cluster = cluster
        found: dict[tuple[int, DeviceSpec], list[int]] = defaultdict(list)
        for node, spec in enumerate(cluster.nodes):
            for place, device in enumerate(spec.devices):
                found[node, device].append(place)
        self.classes = tuple(
            DeviceClass(node=node, device=device, members=tuple(members))
            for (node, device), members in found.items()
        )
        self.stages: list[StageDevices] = []
        self._numbers: dict[StageDevices, int] = {}
        self._groups: dict[tuple[int, int], tuple[tuple[Group, ...], bool]] = {}
        self._homes: dict[Group, dict[int, int]] = {}
        self._dealt: dict[tuple[int, int, int], DeviceSpec] = {}
        self._numbered: dict[tuple[Sequence, bool], tuple[int, ...]] = {}
        self._made: dict[tuple[Group, tuple[tuple[int, int], ...], Link | None], int] = {}

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Devices by class."""
        return tuple(len(each.members) for each in self.classes)

    def groups(
        self, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[tuple[Group, ...], bool]:
        """The groups that a stage may have, and whether these are all: of one node and kind, unless
        there are too few of them for all stages; then of any devices, all if they are no more than
        `MAX_MIXED_GROUPS`, else those of `dealt`."""
        whole = self._num_whole(tensor_parallel) >= pipeline_parallel
        key = tensor_parallel, 0 if whole else pipeline_parallel
        if key not in self._groups:
            if whole:
                has_one = (index for index, size in enumerate(self.sizes) if size >= key[0])
                found, every = [(index,) * tensor_parallel for index in has_one], True
            else:
                found = list(islice(self._mixed(tensor_parallel, 0), MAX_MIXED_GROUPS + 1))
                every = len(found) <= MAX_MIXED_GROUPS
            if not every:
                dealt = self.dealt(tensor_parallel, pipeline_parallel)
                found = [group for sequence in dealt for group in sequence]
            self._groups[key] = tuple(dict.fromkeys(found)), every
        return self._groups[key]

    def _num_whole(self, tensor_parallel: int) -> int:
        """How many stages can have devices of one node and kind at once."""
        return sum(size // tensor_parallel for size in self.sizes)

    def _mixed(self, count: int, first: int) -> Iterator[Group]:
        if count == 0:
            yield ()
        elif count <= sum(self.sizes[first:]):
            for taken in range(min(count, self.sizes[first]), -1, -1):
                for rest in self._mixed(count - taken, first + 1):
                    yield (first,) * taken + rest

    def dealt(self, tensor_parallel: int, pipeline_parallel: int) -> tuple[Sequence, ...]:
        """The largest and fastest devices, as many as there are ranks, dealt to the stages in the
        order given, the strongest first, last, and at both ends."""
        given = list(range(len(self.classes)))
        falling = sorted(given, key=self._strength, reverse=True)
        orders = (given, falling, falling[::-1], falling[::2] + falling[1::2][::-1])
        return tuple(
            dict.fromkeys(self._deal(order, tensor_parallel, pipeline_parallel) for order in orders)
        )

    def _deal(self, order: list[int], tensor_parallel: int, pipeline_parallel: int) -> Sequence:
        whole = self._num_whole(tensor_parallel) >= pipeline_parallel
        size = tensor_parallel if whole else 1
        count = tensor_parallel * pipeline_parallel // size
        parts = [index for index in order for _ in range(self.sizes[index] // size)]
        by_strength = sorted(
            range(len(parts)), key=lambda place: self._strength(parts[place]), reverse=True
        )
        devices = [parts[place] for place in sorted(by_strength[:count]) for _ in range(size)]
        firsts = range(0, len(devices), tensor_parallel)
        return tuple(tuple(sorted(devices[first : first + tensor_parallel])) for first in firsts)

    def _strength(self, index: int) -> tuple[float, ...]:
        device = self.classes[index].device
        rates, budget = device.bandwidths, device.budget
        return (
            budget.device_bytes,
            rates.device_memory,
            rates.gemm[-1].flops_per_s,
            budget.host_bytes,
            rates.host_to_device,
            rates.disk_read,
        )

    @cached_property
    def twins(self) -> tuple[int, ...]:
        """By node: a number that nodes have in common which differ in nothing but their names."""
        special = {name for joined in self.cluster.links for name in joined.nodes}
        numbers: dict[object, int] = {}
        return tuple(
            numbers.setdefault(
                node.name
                if node.name in special
                else (node.devices, node.link, node.shared, node.num_cores),
                len(numbers),
            )
            for node in self.cluster.nodes
        )

    @cached_property
    def has_twins(self) -> bool:
        return len(set(self.twins)) < len(self.twins)

    def number(self, sequence: Sequence, in_turn: bool) -> tuple[int, ...]:
        """The number in ``stages`` of what each stage has. Stages that work ``in_turn`` on passes
        of their own use what their node shares at the same time; else one stage works alone. Cores
        are divided for good, one at least to each device: a stage's threads do not move to the
        next."""
        if (sequence, in_turn) in self._numbered:
            return self._numbered[sequence, in_turn]
        homes = [self._home(group) for group in sequence]
        everyone = [0] * len(self.cluster.nodes)
        for home in homes:
            for node, count in home.items():
                everyone[node] += count
        numbers = []
        for stage, (group, home) in enumerate(zip(sequence, homes, strict=True)):
            users = everyone if in_turn else home
            following = sequence[stage + 1] if stage + 1 < len(sequence) else None
            next_link = self._link(group[-1], following[0]) if following else None
            shares = tuple((users[node], everyone[node]) for node in home)
            numbers.append(self._number(group, shares, next_link))
        self._numbered[sequence, in_turn] = tuple(numbers)
        return self._numbered[sequence, in_turn]

    def _home(self, group: Group) -> dict[int, int]:
        """How many of the group's devices are on which node."""
        if group not in self._homes:
            self._homes[group] = Counter(self.classes[index].node for index in group)
        return self._homes[group]

    def alone(self, group: Group) -> int:
        """The number of a stage that has these devices, shares them with no other stage and sends
        to none: no use of the group is faster."""
        return self.number((group,), in_turn=False)[0]

    def _number(
        self, group: Group, shares: tuple[tuple[int, int], ...], next_link: Link | None
    ) -> int:
        key = (group, shares, next_link)
        if key not in self._made:
            nodes = dict.fromkeys(self.classes[index].node for index in group)
            users = dict(zip(nodes, shares, strict=True))
            shared = {
                index: self._shared(index, *users[self.classes[index].node]) for index in group
            }
            held = StageDevices(
                devices=tuple(shared[index] for index in group),  # equal ones are one object
                group_link=self._group_link(group),
                next_link=next_link,
            )
            if held not in self._numbers:
                self._numbers[held] = len(self.stages)
                self.stages.append(held)
            self._made[key] = self._numbers[held]
        return self._made[key]

    def _shared(self, index: int, at_once: int, ever: int) -> DeviceSpec:
        """A device of that class, with its part of what so many share ``at_once``, or ``ever``."""
        key = index, at_once, ever
        if key not in self._dealt:
            of = self.classes[index]
            shared = self._node(of).shared
            cores = self._node(of).num_cores or ever
            dealt = max(at_once, min(ever, cores))
            rates = of.device.bandwidths.shared_by(
                dealt, tuple(r for r in shared if r == "compute")
            )
            rates = rates.shared_by(at_once, tuple(r for r in shared if r != "compute"))
            self._dealt[key] = replace(of.device, bandwidths=rates, name="")
        return self._dealt[key]

    def _node(self, of: DeviceClass) -> NodeSpec:
        return self.cluster.nodes[of.node]

    def _link(self, left: int, right: int) -> Link:
        return self.cluster.link(self._node(self.classes[left]), self._node(self.classes[right]))

    def _group_link(self, group: Group) -> Link:
        """The link that a collective of these devices waits for."""
        home = self._home(group)
        specs = [self.cluster.nodes[node] for node in home]
        links = [self.cluster.link(left, right) for left, right in combinations(specs, 2)]
        if not links:
            return specs[0].link
        slowest = min(links, key=lambda link: link.bandwidth)
        return slowest.between_nodes(min(home.values()))

    def places(self, sequence: Sequence) -> tuple[tuple[tuple[str, str], ...], ...]:
        """(node, device) by stage and rank: which of the equal devices each one is."""
        left = [iter(each.members) for each in self.classes]
        return tuple(
            tuple(self._place(self.classes[index], next(left[index])) for index in group)
            for group in sequence
        )

    def _place(self, of: DeviceClass, member: int) -> tuple[str, str]:
        node = self._node(of)
        return node.name, node.device_names[member]
