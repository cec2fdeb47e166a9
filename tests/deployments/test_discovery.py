"""A Ray cluster of two nodes, looked at and measured."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from deployments.discovery import MAX_ALL_PAIRS, rounds, usable_nodes
from giantserve.calibrate import calibrate
from giantserve.cli.main import app
from giantserve.errors import ConfigError
from giantserve.free_ports import free_port
from giantserve.node import nvme_folder
from partition.cluster import ClusterSpec
from partition.machine import available_memory_bytes

MEMORY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Found:
    text: str
    said: str
    written: ClusterSpec


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """What `giantserve doctor --cluster` says of two nodes, one with little memory, and a third
    that takes no work."""
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        calibrate(nvme_folder(None))  # once for both nodes, and for every other run
        cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "object_store_memory": 128 << 20},
        )
        try:
            cluster.add_node(num_cpus=1, memory=MEMORY_BYTES, object_store_memory=128 << 20)
            cluster.add_node(num_cpus=0, object_store_memory=128 << 20)
            cluster.wait_for_nodes()
            file = folder / "cluster.yaml"
            command = ["doctor", "--cluster", cluster.address, "--yaml", str(file)]
            done = subprocess.run(
                [sys.executable, "-c", "from giantserve.cli import main; main()", *command],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
                env={**os.environ, "COLUMNS": "160"},
            )
        finally:
            cluster.shutdown()
    assert done.returncode == 0, done.stderr
    yield Found(done.stdout, done.stderr, ClusterSpec.from_yaml(file))


def test_every_node_that_works_is_a_node_with_its_own_budget(found: Found) -> None:
    assert len(found.written.nodes) == 2
    assert len({node.name for node in found.written.nodes}) == 2
    for node in found.written.nodes:
        (device,) = node.devices
        assert device.bandwidths == calibrate(nvme_folder(None)).bandwidths
        assert device.name == "device-0" and not device.staged
        assert node.shared == ("disk", "memory", "compute") and node.num_cores == os.cpu_count()
    memory = sorted(
        node.devices[0].budget.device_bytes + node.devices[0].budget.host_bytes
        for node in found.written.nodes
    )
    assert memory[0] < MEMORY_BYTES < memory[1] < available_memory_bytes()


def test_the_link_between_nodes_is_measured(found: Found) -> None:
    (joined,) = found.written.links
    assert set(joined.nodes) == {node.name for node in found.written.nodes}
    assert joined.link == found.written.network
    assert 1e6 < joined.link.bandwidth < 1e12
    assert joined.link.all_reduce_bandwidth is not None


def test_what_is_found_is_shown_and_progress_told(found: Found) -> None:
    first, second = (node.name for node in found.written.nodes)
    assert f"{first}: " in found.text and "NUMA node(s)" in found.text
    assert f"in {first}" in found.text
    assert f"{first} - {second}" in found.text
    assert f"measuring {first}" in found.said
    assert "measuring links, round 1: 1 pair(s)" in found.said


def test_the_file_is_the_cluster(found: Found) -> None:
    assert ClusterSpec.from_yaml(found.written.to_yaml()) == found.written


def test_a_machine_writes_itself(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    done = CliRunner().invoke(app, ["doctor", "--yaml", str(file)])
    assert done.exit_code == 0, done.output
    (node,) = ClusterSpec.from_yaml(file).nodes
    assert node.devices[0].bandwidths == calibrate(nvme_folder(None)).bandwidths


def test_no_cluster_is_one_line_at_once() -> None:
    command = ["doctor", "--cluster", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(
        [sys.executable, "-c", "from giantserve.cli import main; main()", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("giantserve: no Ray cluster at 127.0.0.1:")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("count", range(1, MAX_ALL_PAIRS + 1))
def test_rounds_hold_every_pair_once_and_no_node_twice(count: int) -> None:
    played = list(rounds(count)) if count > 1 else []
    for pairs in played:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes))
    every = sorted(itertools.chain.from_iterable(played))
    assert every == list(itertools.combinations(range(count), 2))


def test_many_nodes_measure_their_neighbours() -> None:
    every = sorted(itertools.chain.from_iterable(rounds(MAX_ALL_PAIRS + 1)))
    assert every == [(node, node + 1) for node in range(MAX_ALL_PAIRS)]


def test_a_cluster_without_work_is_refused() -> None:
    head = {
        "Alive": True,
        "NodeID": "a" * 56,
        "NodeManagerHostname": "head",
        "Resources": {"memory": 1e9},
    }
    with pytest.raises(ConfigError, match="no node of the cluster offers CPUs or GPUs"):
        usable_nodes([head])
    (one,) = usable_nodes([head, {**head, "Resources": {"CPU": 4.0, "memory": 1e9}}])
    assert one.num_gpus == 0
