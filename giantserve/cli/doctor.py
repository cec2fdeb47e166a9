"""``giantserve doctor``: what this machine has, what it can do, and what would be used."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from giantserve.machine import Machine, look_at_machine
from giantserve.units import format_bytes


def doctor(
    nvme_dir: Annotated[
        Path | None,
        typer.Option(help="The folder whose disk is measured; default: the temp folder."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option(help="Measure again instead of the cached figures.")
    ] = False,
) -> None:
    """Look at devices and memory, measure disk and links, and say what would be used and why."""
    console = Console()
    machine = look_at_machine()
    folder = nvme_dir or Path(tempfile.gettempdir())
    console.print(_hardware(machine))
    console.print(_rates(console, machine, folder, refresh))
    for line in conclusions(machine, folder):
        console.print(line, markup=False, highlight=False)


def conclusions(machine: Machine, folder: Path) -> list[str]:
    """What an engine without options would use, and why."""
    if machine.gpus:
        device = f"device tier: {len(machine.gpus)} GPU(s), one shard each, since NVML sees them"
    else:
        device = "device tier: a capped arena in host memory, since NVML sees no GPU"
    usable = format_bytes(machine.usable_bytes)
    if machine.cgroup_bytes is not None and machine.cgroup_bytes < machine.available_bytes:
        memory = f"host memory: up to {usable}, the cgroup's limit"
    else:
        memory = f"host memory: up to {usable}, what the system has available"
    return [device, memory, f"disk tier: {folder}; name another with --nvme-dir"]


def _hardware(machine: Machine) -> Table:
    limit = "none" if machine.cgroup_bytes is None else format_bytes(machine.cgroup_bytes)
    table = _table("hardware")
    table.add_row("CPUs this process may use", str(machine.num_cpus))
    table.add_row("memory", format_bytes(machine.total_bytes))
    table.add_row("memory available", format_bytes(machine.available_bytes))
    table.add_row("cgroup memory limit", limit)
    for index, gpu in enumerate(machine.gpus):
        sizes = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
        table.add_row(f"GPU {index}: {gpu.name}", f"{sizes}, {gpu.link}")
    return table


def _rates(console: Console, machine: Machine, folder: Path, refresh: bool) -> Table:
    from giantserve.calibrate import calibrate

    device = "cuda" if machine.gpus else "cpu"
    with console.status(f"measuring the disk of {folder}, memory and compute"):
        found = calibrate(folder, device, refresh=refresh)
    rates = found.bandwidths
    table = _table(f"measured at {found.measured_at}")
    direct = "O_DIRECT" if found.direct_io else "through the page cache"
    table.add_row(f"disk read, {direct}", _per_second(rates.disk_read))
    table.add_row("disk write", _per_second(rates.disk_write))
    table.add_row("device memory", _per_second(rates.device_memory))
    table.add_row("host to device", _per_second(rates.host_to_device))
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
