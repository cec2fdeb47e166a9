"""``python -m deployments.discovery ADDRESS``: a live Ray cluster, measured, as a cluster file.

Every node is looked at and calibrated by a task that is pinned to it, and every pair of nodes
measures its link with the messages and collectives that shards would send.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from giantserve.errors import ConfigError, GiantserveError
from partition.byte_size import format_bytes
from partition.cluster import ClusterSpec, NodeLink, NodeSpec
from partition.errors import PlanError
from partition.links import Link

MAX_ALL_PAIRS = 16
"""Of nodes: beyond them only neighbours measure, and the slowest link stands for the others."""

CONNECT_TIMEOUT_S, TIMEOUT_S = 5.0, 300.0


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node that can host shards: its id, its host, a name of its own, and Ray's resources."""

    node_id: str
    host: str
    name: str
    num_gpus: int
    memory_bytes: int

    def run(self, task: Any, *arguments: Any, num_gpus: int = 0) -> Any:
        """Start ``task`` on this node, whatever else it does."""
        pinned = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        remote: Any = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(task)
        return remote.options(scheduling_strategy=pinned).remote(*arguments)


@dataclass(frozen=True, slots=True)
class Discovery:
    """The cluster, and a line for people about each node."""

    cluster: ClusterSpec
    lines: tuple[str, ...]

    def to_yaml(self) -> str:
        """What `ClusterSpec.from_yaml` reads back, the lines as comments."""
        return "".join(f"# {line}\n" for line in self.lines) + self.cluster.to_yaml()


def discover(address: str, folder: str | None = None, *, refresh: bool = False) -> Discovery:
    """Look at the Ray cluster at ``address`` ("auto": the one that runs here) and measure it.

    ``folder`` is where weights would lie on every node's NVMe; None: where an engine without
    options puts them. What a node has measured before is taken from there unless ``refresh``; links
    are measured every time. Raises ConfigError where there is no cluster, or a node cannot be
    measured.
    """
    with _joined(address):
        listed: Any = ray.nodes
        nodes = usable_nodes(listed())
        found: dict[str, tuple[str, NodeSpec]] = {}
        for turn in _one_a_host(nodes):
            _say(f"measuring {', '.join(node.name for node in turn)}")
            tasks = [
                node.run(look, node, folder, refresh, num_gpus=min(2, node.num_gpus))
                for node in turn
            ]
            answers = _answers(tasks, "the nodes did not finish; are their GPUs in use?")
            found |= {node.name: answer for node, answer in zip(turn, answers, strict=True)}
        links = _measure_links(nodes)
    slowest = min((joined.link for joined in links), key=lambda each: each.bandwidth, default=None)
    cluster = ClusterSpec(
        nodes=tuple(found[node.name][1] for node in nodes), network=slowest, links=links
    )
    return Discovery(cluster, tuple(found[node.name][0] for node in nodes))


def usable_nodes(listed: Sequence[dict[str, Any]]) -> list[RayNode]:
    """Those of `ray.nodes` that live and offer a CPU or a GPU, by name.

    Raises ConfigError where there is none.
    """
    nodes = []
    hosts = [node["NodeManagerHostname"] for node in listed if node["Alive"]]
    for node in listed:
        resources = node["Resources"]
        if not node["Alive"] or not (resources.get("CPU") or resources.get("GPU")):
            continue
        host = node["NodeManagerHostname"]
        nodes.append(
            RayNode(
                node_id=node["NodeID"],
                host=host,
                name=host if hosts.count(host) == 1 else f"{host}-{node['NodeID'][:8]}",
                num_gpus=int(resources.get("GPU", 0)),
                memory_bytes=int(resources["memory"]),
            )
        )
    if not nodes:
        raise ConfigError("no node of the cluster offers CPUs or GPUs; start one with `ray start`")
    return sorted(nodes, key=lambda node: node.name)


def look(node: RayNode, folder: str | None, refresh: bool) -> tuple[str, NodeSpec]:
    """Runs on the node: a line about it, and what the planner may know."""
    from giantserve.node import discover_node, nvme_folder

    machine, measured, spec = discover_node(
        nvme_folder(None if folder is None else Path(folder)),
        node.name,
        refresh=refresh,
        max_gpus=node.num_gpus,
        max_memory_bytes=node.memory_bytes,
    )
    gpus = [f"{gpu.name} ({gpu.link or 'link unknown'})" for gpu in machine.gpus]
    said = [
        f"{machine.num_cpus} CPUs on {machine.num_numa_nodes} NUMA node(s)",
        f"{format_bytes(machine.memory_bytes)} of memory",
        *gpus,
        f"the disk of {measured.folder}",
        f"measured {measured.measured_at}",
    ]
    return f"{node.name}: {', '.join(said)}", spec


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of ``count`` nodes once, in rounds in which none takes part twice (the circle
    method of tournaments); neighbours alone beyond `MAX_ALL_PAIRS`."""
    if count > MAX_ALL_PAIRS:
        yield [(left, left + 1) for left in range(0, count - 1, 2)]
        yield [(left, left + 1) for left in range(1, count - 1, 2)]
        return
    players = [*range(count), *([-1] if count % 2 else [])]
    half = len(players) // 2
    for _ in range(len(players) - 1):
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if min(pair) >= 0]
        players = [players[0], players[-1], *players[1:-1]]


def _measure_links(nodes: list[RayNode]) -> tuple[NodeLink, ...]:
    if len(nodes) == 1:
        return ()
    links = []
    for turn, pairs in enumerate(rounds(len(nodes)), start=1):
        _say(f"measuring links, round {turn}: {len(pairs)} pair(s)")
        ends = []
        for left, right in ((nodes[a], nodes[b]) for a, b in pairs):
            num_gpus = 1 if left.num_gpus and right.num_gpus else 0
            place = _answers([left.run(meeting_place)], f"{left.name} did not answer")[0]
            ends += [
                node.run(link_end, bool(num_gpus), rank, *place, num_gpus=num_gpus)
                for rank, node in enumerate((left, right))
            ]
        answers = _answers(ends, "two nodes did not reach each other; are their GPUs in use?")
        links += [
            NodeLink(nodes=(nodes[a].name, nodes[b].name), link=link)
            for (a, b), link in zip(pairs, answers[::2], strict=True)
        ]
    return tuple(sorted(links, key=lambda joined: joined.nodes))


def meeting_place() -> tuple[str, int]:
    """Runs on a node: where others reach it."""
    from giantserve.free_ports import free_port

    address: Any = ray.util.get_node_ip_address
    return str(address()), free_port()


def link_end(on_gpu: bool, rank: int, host: str, port: int) -> Link | None:
    """Runs on either node of a pair."""
    from giantserve.probes.link import probe_end

    return probe_end("cuda:0" if on_gpu else "cpu", rank, host, port)


def _one_a_host(nodes: list[RayNode]) -> Iterator[list[RayNode]]:
    """The nodes in turns: those of one host would disturb each other."""
    hosts: dict[str, list[RayNode]] = {}
    for node in nodes:
        hosts.setdefault(node.host, []).append(node)
    for turn in zip_longest(*hosts.values()):
        yield [node for node in turn if node is not None]


def _answers(tasks: list[Any], late: str) -> list[Any]:
    try:
        return list(ray.get(tasks, timeout=TIMEOUT_S))
    except ray.exceptions.GetTimeoutError:
        for task in tasks:
            ray.cancel(task, force=True)
        raise ConfigError(f"{late} (waited {TIMEOUT_S:.0f} s)") from None
    except ray.exceptions.RayTaskError as error:
        raise ConfigError(str(error.cause)) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(f"a node was lost: {str(error).splitlines()[0]}") from None


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """In the cluster, which is left again."""
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:  # Ray itself would try for a minute
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster at {address}: {str(error).splitlines()[0]}; start one with "
            "`ray start --head`, or give its HOST:PORT"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the cluster file; 1 and a line on stderr after an error."""
    parser = argparse.ArgumentParser(prog="python -m deployments.discovery", description=__doc__)
    parser.add_argument("address", help="HOST:PORT of the cluster's head, or auto")
    parser.add_argument("--folder", help="whose disk is measured on every node")
    parser.add_argument("--refresh", action="store_true", help="measure again")
    arguments = parser.parse_args(argv)
    try:
        found = discover(arguments.address, arguments.folder, refresh=arguments.refresh)
    except (GiantserveError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.to_yaml(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
