"""A Ray cluster that was looked at, as tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from giantserve.errors import ConfigError
from partition.byte_size import format_bytes
from partition.cluster import ClusterSpec, NodeSpec
from partition.links import Link

NODE_COLUMNS = ("devices", "device", "host", "NVMe", "TFLOP/s", "memory", "host to device", "disk")
LINK_COLUMNS = ("GB/s", "latency", "all-reduce GB/s", "its latency")


def discovered(address: str, folder: Path | None, *, refresh: bool) -> str:
    """The cluster file of the Ray cluster at ``address``. Its progress goes to our stderr.

    Raises ConfigError where it cannot be measured.
    """
    command = [sys.executable, "-m", "deployments.discovery", address]
    command += [f"--folder={folder}"] if folder else []
    command += ["--refresh"] if refresh else []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        last = ""
        for line in process.stderr:
            last = line.strip() or last
            if not line.startswith("error:"):
                print(line, end="", file=sys.stderr, flush=True)
        text = process.stdout.read()
    if process.returncode:
        raise ConfigError(last.removeprefix("error: ") or f"status {process.returncode}")
    return text


def print_cluster(console: Console, text: str) -> None:
    """The file's comments, its nodes and its links."""
    cluster = ClusterSpec.from_yaml(text)
    for line in text.splitlines():
        if line.startswith("# "):
            console.print(line[2:], markup=False, highlight=False)
    table = _table("node", *NODE_COLUMNS)
    for node in cluster.nodes:
        table.add_row(node.name, *_node_cells(node))
    console.print(table)
    table = _table("link", *LINK_COLUMNS)
    for node in cluster.nodes:
        table.add_row(f"in {node.name}", *_link_cells(node.link))
    for joined in cluster.links:
        table.add_row(" - ".join(joined.nodes), *_link_cells(joined.link))
    console.print(table)


def _node_cells(node: NodeSpec) -> list[str]:
    """Of the first device, as are the others of a node that was looked at."""
    device = node.devices[0]
    rates = device.bandwidths
    return [
        str(len(node.devices)),
        format_bytes(device.budget.device_bytes),
        format_bytes(device.budget.host_bytes),
        format_bytes(device.budget.nvme_bytes),
        f"{rates.gemm[-1].flops_per_s / 1e12:.2f}",
        *(
            f"{rate / 1e9:.1f} GB/s"
            for rate in (rates.device_memory, rates.host_to_device, rates.disk_read)
        ),
    ]


def _link_cells(link: Link) -> list[str]:
    reduce_rate = link.all_reduce_bandwidth or link.bandwidth
    reduce_latency_s = link.all_reduce_latency_s
    return [
        f"{link.bandwidth / 1e9:.2f}",
        f"{link.latency_s * 1e6:.0f} us",
        f"{reduce_rate / 1e9:.2f}",
        f"{(link.latency_s if reduce_latency_s is None else reduce_latency_s) * 1e6:.0f} us",
    ]


def _table(first: str, *others: str) -> Table:
    table = Table(title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
