"""``giantserve doctor``: what this machine has, what it can do, and what would be used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from giantserve.cli.cluster_table import discovered, print_cluster
from giantserve.errors import ConfigError
from partition.byte_size import format_bytes
from partition.calibration import Calibration
from partition.cluster import ClusterSpec
from partition.machine import Machine


def doctor(
    nvme_dir: Annotated[
        Path | None,
        typer.Option(
            help="The folder whose disk is measured; default: where `serve` keeps weights and KV."
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Measure the nodes and links of this Ray cluster instead; auto: the one that "
            "runs here.",
        ),
    ] = None,
    yaml: Annotated[
        Path | None,
        typer.Option(help="Also write what was found, as a file for `plan --cluster`."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option(help="Measure again instead of the cached figures.")
    ] = False,
) -> None:
    """Look at devices and memory, measure disk and links, and say what would be used and why."""
    console = Console()
    if cluster is not None:
        text = discovered(cluster, nvme_dir, refresh=refresh)
        print_cluster(console, text)
    else:
        text = _here(console, nvme_dir, refresh=refresh)
    if yaml is not None:
        try:
            yaml.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {yaml}: {error.strerror}; name another file") from None


def _here(console: Console, nvme_dir: Path | None, *, refresh: bool) -> str:
    """This machine, in tables and as a cluster file."""
    from giantserve.node import discover_node, nvme_folder

    folder = nvme_folder(nvme_dir)
    with console.status(f"measuring the disk of {folder}, memory and compute"):
        machine, found, node = discover_node(folder, refresh=refresh)
    console.print(_hardware(machine))
    console.print(_rates(found))
    for line in conclusions(machine, folder):
        console.print(line, markup=False, highlight=False)
    return ClusterSpec(nodes=(node,)).to_yaml()


def conclusions(machine: Machine, folder: Path) -> list[str]:
    """What an engine without options would use, and why."""
    if machine.gpus:
        device = f"device tier: {len(machine.gpus)} GPU(s), one shard each, since NVML sees them"
    else:
        device = "device tier: a capped arena in host memory, since NVML sees no GPU"
    usable = format_bytes(machine.memory_bytes)
    if machine.memory_bytes < machine.available_bytes:
        memory = f"host memory: up to {usable}, what the cgroup's limit leaves"
    else:
        memory = f"host memory: up to {usable}, what the system has available"
    disk = f"disk tier: {folder}; name another with --nvme-dir"
    return [device, memory, disk, f"decode attention, norms and MLPs on the CPU: {_kernels()}"]


def _kernels() -> str:
    from giantserve.models.native_library import KernelUnavailableError, load_kernels

    try:
        return f"compiled kernels, for x86-64-v{load_kernels()[1]}"
    except KernelUnavailableError as error:
        return f"torch's, slower, since {error}"


def _hardware(machine: Machine) -> Table:
    table = _table("hardware")
    table.add_row("CPUs this process may use", str(machine.num_cpus))
    table.add_row("NUMA nodes", str(machine.num_numa_nodes))
    table.add_row("memory", format_bytes(machine.total_bytes))
    table.add_row("memory available", format_bytes(machine.available_bytes))
    table.add_row("memory that the cgroup leaves", format_bytes(machine.memory_bytes))
    for index, gpu in enumerate(machine.gpus):
        sizes = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
        table.add_row(f"GPU {index}: {gpu.name}", f"{sizes}, {gpu.link or 'link unknown'}")
    return table


def _rates(found: Calibration) -> Table:
    rates = found.bandwidths
    table = _table(f"measured at {found.measured_at}")
    direct = "O_DIRECT" if found.direct_io else "through the page cache"
    table.add_row(f"disk read, {direct}", _per_second(rates.disk_read))
    table.add_row("disk write", _per_second(rates.disk_write))
    for block in rates.disk_blocks:
        both = f"{_per_second(block.read)} / {_per_second(block.write)}"
        table.add_row(f"disk read / write, blocks of {format_bytes(block.block_bytes)}", both)
    for name in ("posix", "deepnvme"):
        rate = found.storage.get(name)
        told = "not built here" if rate is None else _per_second(rate)
        used = ", used" if name == found.storage_backend else ""
        table.add_row(f"weights read by the {name} backend", told + used)
    table.add_row("device memory", _per_second(rates.device_memory))
    table.add_row("host to device", _per_second(rates.host_to_device))
    for codec in rates.kv_codecs:
        both = f"{_per_second(codec.decode)} / {_per_second(codec.encode)}"
        table.add_row(f"KV from / to {codec.storage_dtype}", both)
    for gemm in rates.gemm:
        speed = f"{gemm.flops_per_s / 1e12:.2f} TFLOP/s"
        table.add_row(f"{found.dtype} matrix product, {gemm.rows} rows", speed)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", min_width=64)
    table.add_column()
    table.add_column(justify="right")
    return table


def _per_second(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"
