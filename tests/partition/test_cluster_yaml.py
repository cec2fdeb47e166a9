from __future__ import annotations

from pathlib import Path

import pytest

from partition import ClusterSpec, PlanError

GOOD = """
nodes:
  - name: left
    shared: [disk]
    link: {bandwidth: 3e10, latency_s: 1e-5}
    devices: [&device {budget: {device_bytes: 24GiB, host_bytes: 1.5 GB, nvme_bytes: 0}, bandwidths:
      {device_memory: 9e11, host_to_device: 2.4e+10, device_to_host: 2.4e+10, disk_read: 6000000000,
       disk_write: 5e9, gemm: [{rows: 1, flops_per_s: 1e12}, {rows: 64, flops_per_s: 5e13}]}},
      *device]
"""


def test_reads_nodes_devices_and_sizes(tmp_path: Path) -> None:
    cluster = ClusterSpec.from_yaml(GOOD)
    assert cluster.num_devices == 2
    device = cluster.nodes[0].devices[0]
    assert device.budget.device_bytes == 24 << 30
    assert device.budget.host_bytes == 1_500_000_000
    assert device.bandwidths.disk_read == 6e9
    (tmp_path / "cluster.yaml").write_text(GOOD)
    assert ClusterSpec.from_yaml(tmp_path / "cluster.yaml") == cluster


def test_devices_in_use_share_what_the_node_shares() -> None:
    one, two = (ClusterSpec.from_yaml(GOOD).devices(count) for count in (1, 2))
    assert one[0].bandwidths.disk_read == 6e9
    assert [d.bandwidths.disk_read for d in two] == [3e9, 3e9]
    assert two[0].bandwidths.device_memory == 9e11


def test_flops_are_interpolated_in_the_logarithm_of_rows() -> None:
    rates = ClusterSpec.from_yaml(GOOD).nodes[0].devices[0].bandwidths
    assert rates.flops_per_s(1) == 1e12
    assert rates.flops_per_s(8) == pytest.approx(25.5e12)
    assert rates.flops_per_s(4096) == 5e13


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("shared:", "shard:", r"unknown key nodes\[0\].shard;"),
        ("[disk]", "[tape]", r"nodes\[0\]: shared names 'tape'"),
        ("24GiB", "24GiBs", r"nodes\[0\].devices\[0\].budget.device_bytes: '24GiBs'"),
        ("24GiB", "-1", r"budget.device_bytes is -1"),
        ("9e11", "-9e11", r"nodes\[0\].devices\[0\].bandwidths: device_memory is -9"),
        ("9e11", ".nan", r"device_memory must be a finite number"),
        ("disk_write: 5e9,", "", r"bandwidths.disk_write is missing"),
        ("rows: 64", "rows: 1", "gemm rows"),
        ("rows: 64", "rows: many", r"gemm\[1\].rows must be an integer"),
        ("nodes:", "nodes: []\nx:", "unknown key x"),
        ("nodes:", "nodes: [", "not YAML"),
    ],
)
def test_nonsense_is_refused_by_name(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(PlanError, match=said):
        ClusterSpec.from_yaml(GOOD.replace(old, new))


def test_empty_and_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="must be a map"):
        ClusterSpec.from_yaml("")
    with pytest.raises(PlanError, match="no nodes"):
        ClusterSpec.from_yaml("nodes: []")
    with pytest.raises(PlanError, match="cannot read"):
        ClusterSpec.from_yaml(tmp_path / "absent.yaml")
