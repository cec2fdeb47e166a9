from __future__ import annotations

import re
from pathlib import Path

import pytest

from giantserve.cli.main import main
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


DEVICE = r"nodes[0].devices[0]"


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("shared:", "shard:", 4, "nodes[0].shard: unknown key; known are"),
        ("[disk]", "[tape]", 4, "nodes[0].shared: 'tape' cannot be shared; known are memory, disk"),
        ("24GiB", "24GiBs", 6, f"{DEVICE}.budget.device_bytes: '24GiBs' is not a size"),
        ("24GiB", "-1", 6, f"{DEVICE}.budget.device_bytes: -1 cannot be"),
        ("9e11", "-9e11", 7, f"{DEVICE}.bandwidths.device_memory: -900000000000.0 cannot be"),
        ("9e11", ".nan", 7, f"{DEVICE}.bandwidths.device_memory: must be a finite number"),
        ("9e11", "[1]", 7, f"{DEVICE}.bandwidths.device_memory: must be a finite number, but is"),
        ("{bandwidth: 3e10,", "{bandwidth: 0,", 5, "nodes[0].link.bandwidth: 0.0 cannot be"),
        ("disk_write: 5e9,", "", 6, f"{DEVICE}.bandwidths.disk_write: missing; add it"),
        ("rows: 64", "rows: 1", 8, f"{DEVICE}.bandwidths.gemm: rows are [1, 1]"),
        ("rows: 64", "rows: 0", 8, f"{DEVICE}.bandwidths.gemm[1].rows: 0 cannot be"),
        ("rows: 64", "rows: many", 8, f"{DEVICE}.bandwidths.gemm[1].rows: must be an integer"),
        ("nodes:", "nodes: []\nx:", 3, "x: unknown key; known are nodes, network, links"),
        ("name: left", "name: [left]", 3, "nodes[0].name: must be a string, but is a list"),
        ("name: left", "name: left\n    name: right", 4, "name is given twice; keep one"),
        ("name: left", "name: !!python/tuple [1]", 3, "not YAML: could not determine"),
        ("name: left", "name: 'left", 10, "not YAML: found unexpected end of stream"),
        ("name: left", "name: !!int left", 1, "not YAML: invalid literal"),
        ("name: left", "name: *left", 3, "not YAML: found undefined alias 'left'"),
        ("name: left", "name: \a", 3, "not YAML: the character 7 cannot stand here"),
        (
            "nodes:",
            "links: [{nodes: [left, up], link: *l}]\nnodes:",
            2,
            "not YAML: found undefined",
        ),
    ],
)
def test_nonsense_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, said: str
) -> None:
    assert old in GOOD
    file = tmp_path / "cluster.yaml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(PlanError, match=re.escape(f"{file}:{line}: {said}")):
        ClusterSpec.from_yaml(file)
    with pytest.raises(PlanError, match=re.escape(f"line {line}: {said}")):
        ClusterSpec.from_yaml(file.read_text())


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ("[left, up]", "line 12: links[0].nodes: up is no node; there are left, right"),
        ("[left, left]", "line 12: links[0].nodes: left, left cannot be joined; name two nodes"),
        ("[left]", "line 12: links[0].nodes: left cannot be joined; name two nodes"),
    ],
)
def test_links_join_two_nodes_that_exist(nodes: str, said: str) -> None:
    second = "  - {name: right, link: {bandwidth: 1, latency_s: 0}, devices: [*device]}\n"
    link = "{bandwidth: 1, latency_s: 0}"
    text = f"{GOOD}{second}links:\n  - {{nodes: {nodes}, link: {link}}}\n"
    with pytest.raises(PlanError, match=r"^line 1: network: missing, but there are several"):
        ClusterSpec.from_yaml(text)
    with pytest.raises(PlanError, match=f"^{re.escape(said)}$"):
        ClusterSpec.from_yaml(f"{text}network: {link}\n")
    same_name = f"{text}network: {link}\n".replace("right", "left")
    with pytest.raises(PlanError, match="line 2: nodes: their names are left, left; give each"):
        ClusterSpec.from_yaml(same_name)


def test_merged_keys_stand_where_they_were_written() -> None:
    text = GOOD.replace("*device]", "{<<: *device, staged: perhaps}]")
    with pytest.raises(PlanError, match=r"^line 9: nodes\[0\].devices\[1\].staged: must be true"):
        ClusterSpec.from_yaml(text)
    merged = ClusterSpec.from_yaml(text.replace("perhaps", "true")).nodes[0].devices
    assert [device.staged for device in merged] == [False, True]
    assert merged[0].bandwidths == merged[1].bandwidths


def test_text_that_refers_to_itself_or_nests_without_end_is_refused() -> None:
    with pytest.raises(PlanError, match=r"line 1: nodes\[0\]: must be a map, but is a list"):
        ClusterSpec.from_yaml("nodes: &a [*a]")
    with pytest.raises(PlanError, match="line 1: not YAML: it is nested too deeply"):
        ClusterSpec.from_yaml("[" * 2000)


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD.replace("6000000000", "-6"))
    monkeypatch.setattr("sys.argv", ["giantserve", "plan", str(tmp_path), "--cluster", str(file)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    said = f"{file}:7: {DEVICE}.bandwidths.disk_read: -6.0 cannot be; it must be a positive, finite"
    assert shown.err == f"giantserve: {said} number\n"


def test_empty_and_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="must be a map"):
        ClusterSpec.from_yaml("")
    with pytest.raises(PlanError, match="no nodes"):
        ClusterSpec.from_yaml("nodes: []")
    with pytest.raises(PlanError, match="cannot read"):
        ClusterSpec.from_yaml(tmp_path / "absent.yaml")
