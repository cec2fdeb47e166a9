from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from partition import PlanError
from partition.hardware import ACCELERATORS, DRIVES, LINKS, accelerator, drive, link


@pytest.mark.parametrize(
    ("find", "written", "name"),
    [
        (accelerator, "h100", "H100-SXM"),
        (accelerator, "H100-80GB", "H100-SXM"),
        (accelerator, "NVIDIA H100 80GB HBM3", "H100-SXM"),
        (accelerator, "NVIDIA H100 PCIe", "H100-PCIe"),
        (accelerator, "NVIDIA A100-SXM4-80GB", "A100-80GB"),
        (accelerator, "a100 40 gb", "A100-40GB"),
        (accelerator, "NVIDIA GeForce RTX 4090", "RTX-4090"),
        (accelerator, "rtx4090", "RTX-4090"),
        (accelerator, "l40s", "L40S"),
        (accelerator, "NVIDIA H200", "H200"),
        (accelerator, "b200", "B200"),
        (drive, "nvme gen4 x4", "Gen4 x4"),
        (drive, "Gen5", "Gen5 x4"),
        (link, "nvlink-4.0", "NVLink4"),
        (link, "NVLink 5", "NVLink5"),
        (link, "pcie gen4 x16", "PCIe 4.0"),
        (link, "PCIe 5", "PCIe 5.0"),
        (link, "200 gbe", "200GbE"),
        (link, "infiniband-ndr", "InfiniBand NDR"),
        (link, "HDR", "InfiniBand HDR"),
    ],
)
def test_names_are_found_as_people_write_them(
    find: Callable[[str], object], written: str, name: str
) -> None:
    table: dict[Callable[[str], object], dict[str, object]] = {
        accelerator: {**ACCELERATORS},
        drive: {**DRIVES},
        link: {key: known.link for key, known in LINKS.items()},
    }
    assert find(written) == table[find][name]


def test_no_two_names_mean_the_same() -> None:
    for find, table in ((accelerator, ACCELERATORS), (drive, DRIVES)):
        for name, known in table.items():
            assert all(find(each) is known for each in (name, *known.aliases))
    for name, known in LINKS.items():
        assert all(link(each) == known.link for each in (name, *known.aliases))


@pytest.mark.parametrize(
    ("find", "name", "said"),
    [
        (accelerator, "A100", "'A100' is not known; did you mean A100-40GB or A100-80GB"),
        (accelerator, "H1000", "did you mean H100-SXM or H100-PCIe"),
        (accelerator, "abacus", "'abacus' is not known; there are A100-40GB, A100-80GB, H100-SXM"),
        (drive, "Gen6 x4", "did you mean Gen3 x4 or Gen4 x4 or Gen5 x4"),
        (link, "NVLink6", "did you mean NVLink3 or NVLink4 or NVLink5"),
        (link, "InfiniBand XDR", "InfiniBand HDR or InfiniBand NDR"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    find: Callable[[str], object], name: str, said: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(said)):
        find(name)


def test_what_is_known_of_an_h100() -> None:
    known = accelerator("H100")
    rates = known.bandwidths(drive("Gen4"), 4)
    assert known.usable_bytes == 72 << 30
    assert rates.device_memory == pytest.approx(0.91 * 3.35e12)
    assert rates.host_to_device == rates.device_to_host == pytest.approx(50.4e9)
    assert (rates.disk_read, rates.disk_write) == pytest.approx((23.4e9, 12.6e9))
    assert rates.flops_per_s(4096) == pytest.approx(0.72 * 989.4e12)
    assert rates.flops_per_s(1) == pytest.approx(0.65 * 989.4e12 / 128)


def test_newer_hardware_is_never_slower() -> None:
    pairs = (("A100-40GB", "A100-80GB"), ("A100-80GB", "H100"), ("H100", "H200"), ("H200", "B200"))
    for old, new in pairs:
        slow, fast = (accelerator(name).bandwidths(drive("Gen4")) for name in (old, new))
        assert slow.device_memory < fast.device_memory
        for rows in (1, 64, 500, 4096):
            assert slow.flops_per_s(rows) <= fast.flops_per_s(rows)
        assert accelerator(old).usable_bytes <= accelerator(new).usable_bytes
    for chain in (
        ("PCIe 3", "PCIe 4", "PCIe 5", "NVLink3", "NVLink4", "NVLink5"),
        ("10GbE", "25GbE", "100GbE", "200GbE", "400GbE"),
        ("HDR", "NDR"),
    ):
        for size in (1 << 10, 1 << 20, 1 << 30):
            times = [link(name).send_s(size) for name in chain]
            assert times == sorted(times, reverse=True)
    reads = [drive(f"Gen{generation}").read for generation in (3, 4, 5)]
    assert reads == sorted(reads)


def test_the_documentation_lists_every_name() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text()
    listed = text.split("| | names |")[1].split("\n\n")[0]
    for name in (*ACCELERATORS, *DRIVES, *LINKS):
        assert re.search(rf"[|,] {re.escape(name)}( \(|,| \|)", listed), name
