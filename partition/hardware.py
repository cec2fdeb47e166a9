"""Known hardware, for planning what one does not have: GPUs, drives and links, by name.

Peaks are the makers'; `*_SHARE` is what programs reach of them. Shares that are called measured
come from Vidur's public tables of A100 and H100 nodes (Agrawal et al., 2024), as
``bench/planner_public.py`` reads them; a machine that one has is better calibrated than looked up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from partition.bandwidths import Bandwidths, GemmRate
from partition.errors import PlanError
from partition.links import Link

GB = 10**9
GIB = 1 << 30

GEMM_SHARES = ((256, 0.65), (512, 0.73), (4096, 0.72))
"""Rows and the part of the dense bf16 peak that a large product reaches: measured, A100 and H100
averaged. Fewer rows than a tile are the tile's loss (``row_tile``)."""

GPU_ROW_TILE = 128
"""Rows of the usual tile (NVIDIA, matrix multiplication guide); measured to hold on both."""

HOST_SHARE = 0.8
"""Of a PCIe link: packet headers and flow control; what copies from pinned memory reach."""

USABLE_MEMORY = 0.9
"""Of a GPU's memory: the rest is the driver's context, the communication library's buffers and
fragments."""

DRIVE_SHARE = 0.9
"""Of a data sheet's sequential rates, for reads of some MiB past the page cache."""

PCIE_LANES_16 = {"PCIe 3.0": 15.75e9, "PCIe 4.0": 31.5e9, "PCIe 5.0": 63.0e9}
"""Bytes/s in one direction over 16 lanes: 8, 16 and 32 GT/s a lane, 128b/130b (PCI-SIG)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A GPU: bytes, bytes/s and dense bf16 FLOP/s as ``source`` states them. ``memory_share`` of
    the memory's peak is reached. ``bus`` leads to the host, ``link`` to the node's others."""

    memory_bytes: int
    memory_bandwidth: float
    flops_per_s: float
    bus: str
    link: str
    source: str
    memory_share: float = 0.85
    aliases: tuple[str, ...] = ()

    @property
    def usable_bytes(self) -> int:
        """What a plan may put on it."""
        return int(USABLE_MEMORY * self.memory_bytes)

    def bandwidths(self, drive: Drive, num_drives: int = 1) -> Bandwidths:
        """Its rates in a machine with these drives, which it has to itself."""
        host = HOST_SHARE * PCIE_LANES_16[self.bus]
        return Bandwidths(
            device_memory=self.memory_share * self.memory_bandwidth,
            host_to_device=host,
            device_to_host=host,
            disk_read=num_drives * DRIVE_SHARE * drive.read,
            disk_write=num_drives * DRIVE_SHARE * drive.write,
            gemm=tuple(
                GemmRate(rows=rows, flops_per_s=share * self.flops_per_s)
                for rows, share in GEMM_SHARES
            ),
            row_tile=GPU_ROW_TILE,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """An NVMe drive on four lanes: sequential bytes/s as ``source`` states them."""

    read: float
    write: float
    source: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownLink:
    """A link: its peak in bytes/s in one direction, as ``source`` states it, and what is reached
    of it by a message (``share``) and, where this differs, by a collective. Latencies in
    seconds."""

    peak: float
    share: float
    latency_s: float
    source: str
    collective_share: float | None = None
    collective_latency_s: float | None = None
    aliases: tuple[str, ...] = ()

    @property
    def link(self) -> Link:
        """What the cost model takes."""
        collective = self.collective_share
        return Link(
            bandwidth=self.share * self.peak,
            latency_s=self.latency_s,
            all_reduce_bandwidth=None if collective is None else collective * self.peak,
            all_reduce_latency_s=self.collective_latency_s,
        )


ACCELERATORS: dict[str, Accelerator] = {
    "A100-40GB": Accelerator(
        memory_bytes=40 * GIB,
        memory_bandwidth=1555e9,
        memory_share=0.8,
        flops_per_s=312e12,
        bus="PCIe 4.0",
        link="NVLink3",
        source="NVIDIA A100 data sheet (SXM); memory share measured on A100-80GB",
        aliases=("A100-SXM4-40GB", "A100-SXM-40GB"),
    ),
    "A100-80GB": Accelerator(
        memory_bytes=80 * GIB,
        memory_bandwidth=2039e9,
        memory_share=0.8,
        flops_per_s=312e12,
        bus="PCIe 4.0",
        link="NVLink3",
        source="NVIDIA A100 data sheet (SXM); memory share measured",
        aliases=("A100-SXM4-80GB", "A100-SXM-80GB"),
    ),
    "H100-SXM": Accelerator(
        memory_bytes=80 * GIB,
        memory_bandwidth=3350e9,
        memory_share=0.91,
        flops_per_s=989.4e12,
        bus="PCIe 5.0",
        link="NVLink4",
        source="NVIDIA H100 data sheet; memory share measured",
        aliases=("H100", "H100-80GB", "H100-80GB-HBM3", "H100-SXM5", "H100-SXM5-80GB"),
    ),
    "H100-PCIe": Accelerator(
        memory_bytes=80 * GIB,
        memory_bandwidth=2000e9,
        flops_per_s=756e12,
        bus="PCIe 5.0",
        link="PCIe 5.0",
        source="NVIDIA H100 data sheet (without the NVLink bridge)",
        aliases=("H100-PCIe-80GB", "H100-80GB-PCIe"),
    ),
    "H200": Accelerator(
        memory_bytes=141 * GB,
        memory_bandwidth=4800e9,
        memory_share=0.91,
        flops_per_s=989.4e12,
        bus="PCIe 5.0",
        link="NVLink4",
        source="NVIDIA H200 data sheet (SXM); memory share as measured on H100",
        aliases=("H200-SXM", "H200-141GB", "H200-SXM-141GB"),
    ),
    "B200": Accelerator(
        memory_bytes=180 * GB,
        memory_bandwidth=8000e9,
        memory_share=0.91,
        flops_per_s=2250e12,
        bus="PCIe 5.0",
        link="NVLink5",
        source="NVIDIA HGX B200 data sheet, an eighth; memory share as measured on H100",
        aliases=("B200-SXM", "B200-180GB", "HGX-B200"),
    ),
    "L40S": Accelerator(
        memory_bytes=48 * GB,
        memory_bandwidth=864e9,
        flops_per_s=362.05e12,
        bus="PCIe 4.0",
        link="PCIe 4.0",
        source="NVIDIA L40S data sheet",
        aliases=("L40S-48GB",),
    ),
    "RTX-4090": Accelerator(
        memory_bytes=24 * GIB,
        memory_bandwidth=1008e9,
        flops_per_s=165.2e12,
        bus="PCIe 4.0",
        link="PCIe 4.0",
        source="NVIDIA Ada GPU architecture white paper (bf16, fp32 sums)",
        aliases=("4090", "RTX-4090-24GB", "4090-24GB"),
    ),
}

DRIVES: dict[str, Drive] = {
    "Gen3 x4": Drive(
        read=3.2e9, write=3.0e9, source="Intel P4510 8 TB product brief", aliases=("Gen3",)
    ),
    "Gen4 x4": Drive(
        read=6.5e9, write=3.5e9, source="Samsung PM9A3 announcement (U.2)", aliases=("Gen4",)
    ),
    "Gen5 x4": Drive(
        read=13.0e9, write=6.6e9, source="Samsung PM1743 announcement", aliases=("Gen5",)
    ),
}


def _nvlink(generation: int, peak: float, collective_share: float, **latencies: float) -> KnownLink:
    return KnownLink(
        peak=peak,
        share=0.8,
        collective_share=collective_share,
        source="NVIDIA NVLink page, half the total of both directions; shares and latencies "
        + ("measured" if generation < 5 else "as measured for NVLink4"),
        aliases=(f"NVLink {generation}", f"NVLink Gen{generation}"),
        **latencies,
    )


def _pcie(name: str, peak: float) -> KnownLink:
    generation = name.removeprefix("PCIe ").removesuffix(".0")
    forms = ("PCIe {}", "PCIe {} x16", "PCIe Gen{}", "PCIe Gen{} x16")
    return KnownLink(
        peak=peak,
        share=HOST_SHARE,
        latency_s=2e-5,
        source="PCI-SIG base specification, 16 lanes; latency of a kernel's launch and a copy",
        aliases=(*(form.format(generation) for form in forms), f"{name} x16"),
    )


def _network(gigabits: int, *aliases: str) -> KnownLink:
    if gigabits < 100:
        share, latency_s, collective_latency_s = 0.9, 5e-5, 1.3e-4
        reached = "what TCP leaves of it, and twice the latencies of faster networks"
    else:
        share, latency_s, collective_latency_s = 0.73, 2.5e-5, 6.5e-5
        reached = (
            "share and latency as measured between H100 nodes at 400 Gbit/s, a collective's "
            "between A100 nodes at 2 KiB"
        )
    return KnownLink(
        peak=gigabits * 1e9 / 8,
        share=share,
        latency_s=latency_s,
        collective_latency_s=collective_latency_s,
        source=f"the line rate of one port; {reached}",
        aliases=aliases,
    )


LINKS: dict[str, KnownLink] = {
    "NVLink3": _nvlink(3, 300e9, 0.63, latency_s=13e-6, collective_latency_s=54e-6),
    "NVLink4": _nvlink(4, 450e9, 0.89, latency_s=7e-6, collective_latency_s=29e-6),
    "NVLink5": _nvlink(5, 900e9, 0.89, latency_s=7e-6, collective_latency_s=29e-6),
    **{name: _pcie(name, peak) for name, peak in PCIE_LANES_16.items()},
    **{
        f"{rate}GbE": _network(
            rate,
            f"{rate} Gb Ethernet",
            f"{rate}G Ethernet",
            f"Ethernet {rate}G",
        )
        for rate in (10, 25, 100, 200, 400)
    },
    "InfiniBand HDR": _network(200, "HDR", "IB HDR", "InfiniBand HDR200"),
    "InfiniBand NDR": _network(400, "NDR", "IB NDR", "InfiniBand NDR400"),
}


def accelerator(name: str) -> Accelerator:
    """The GPU of this name. Raises PlanError with the nearest names for one that is not known."""
    return _find(ACCELERATORS, name)


def drive(name: str) -> Drive:
    """The drive of this name. Raises as `accelerator`."""
    return _find(DRIVES, name)


def link(name: str) -> Link:
    """The link of this name. Raises as `accelerator`."""
    return _find(LINKS, name).link


Known = TypeVar("Known", Accelerator, Drive, KnownLink)

_NOISE = re.compile(r"nvidia|geforce|nvme|ssd|\.0\b|[^a-z0-9]")


def _find(table: Mapping[str, Known], name: str) -> Known:
    """By name or alias; case, spaces, dashes, the maker and a trailing ".0" do not matter."""
    plain = {_plain(key): known for key, known in table.items()}
    for known in table.values():
        plain |= {_plain(alias): known for alias in known.aliases}
    wanted = _plain(name)
    if wanted in plain:
        return plain[wanted]
    close = difflib.get_close_matches(wanted, plain, n=6)
    near = [key for key, known in table.items() if any(plain[each] is known for each in close)]
    said = f"did you mean {' or '.join(near)}? There are" if near else "there are"
    raise PlanError(f"{name!r} is not known; {said} {', '.join(table)}; or give numbers")


def _plain(name: str) -> str:
    return _NOISE.sub("", name.lower())
