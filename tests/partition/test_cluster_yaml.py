from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from giantserve.cli.main import main
from kvcache.tier import TierBudget
from partition import ClusterSpec, DeviceSpec, NodeLink, PlanError, RuntimeRates
from partition.codec import encode
from partition.hardware import accelerator, drive, link

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


SHORT = """
network: {hardware: 200GbE, ports: 4}
links: [{nodes: [big-0, small], link: 10GbE}]
nodes:
  - name: big
    nodes: 2
    hardware: H100-80GB
    count: 8
    host_memory: 1TiB
    nvme: {hardware: Gen4 x4, count: 4, capacity: 4TB}
  - name: small
    link: PCIe 4
    host_memory: 120GiB
    nvme: {read: 5e9, write: 2e9, capacity: 1TiB}
    devices:
      - {hardware: L40S, count: 2}
      - hardware: RTX 4090
        name: odd
        staged: false
        budget: {device_bytes: 20GiB, host_bytes: 1GiB}
        bandwidths: {device_memory: 9e11, runtime: {layer_latency_s: 1e-4}}
"""


def test_the_short_form_repeats_divides_and_looks_up() -> None:
    cluster = ClusterSpec.from_yaml(SHORT)
    assert [(node.name, len(node.devices)) for node in cluster.nodes] == [
        ("big-0", 8),
        ("big-1", 8),
        ("small", 3),
    ]
    assert set(cluster.nodes[0].devices + cluster.nodes[1].devices) == {
        DeviceSpec(
            name="H100-80GB",
            staged=True,
            budget=TierBudget(
                device_bytes=72 << 30, host_bytes=128 << 30, nvme_bytes=2_000_000_000_000
            ),
            bandwidths=accelerator("H100").bandwidths(drive("Gen4"), 4),
        )
    }
    assert [node.link for node in cluster.nodes] == [link("NVLink4")] * 2 + [link("PCIe 4")]
    assert [node.shared for node in cluster.nodes] == [("disk",)] * 3
    port = link("200GbE")
    assert cluster.network == replace(port, all_reduce_bandwidth=4 * port.bandwidth)
    slow = link("10GbE")
    assert cluster.links == (
        NodeLink(nodes=("big-0", "small"), link=replace(slow, all_reduce_bandwidth=slow.bandwidth)),
    )


def test_what_is_written_overrides_the_library() -> None:
    first, second, odd = ClusterSpec.from_yaml(SHORT).nodes[-1].devices
    assert first == second
    assert first.budget.host_bytes == 40 << 30
    assert odd.budget == TierBudget(
        device_bytes=20 << 30, host_bytes=1 << 30, nvme_bytes=(1 << 40) // 3
    )
    assert (odd.name, odd.staged) == ("odd", False)
    known = accelerator("4090").bandwidths(drive("Gen3"))
    assert odd.bandwidths == replace(
        known,
        device_memory=9e11,
        disk_read=5e9,
        disk_write=2e9,
        runtime=RuntimeRates(layer_latency_s=1e-4),
    )


def test_a_name_and_the_numbers_that_it_stands_for_are_the_same_cluster() -> None:
    short = ClusterSpec.from_yaml("nodes: [{hardware: H200, count: 2, host_memory: 64GiB}]")
    assert ClusterSpec.from_yaml(yaml.safe_dump(encode(short))) == short
    assert short.nodes[0].devices[0].budget.nvme_bytes == 0
    assert short.nodes[0].name == "node-0"
    named = "{hardware: NVLink4, bandwidth: 1e11}"
    joined = ClusterSpec.from_yaml(
        f"nodes: [{{hardware: H200, nodes: 2, link: {named}, host_memory: 0}}]\nnetwork: "
        "{hardware: NDR, all_reduce_bandwidth: 7e9}"
    )
    assert [node.name for node in joined.nodes] == ["node-0", "node-1"]
    assert joined.nodes[0].link == replace(link("NVLink4"), bandwidth=1e11)
    assert joined.network == replace(link("NDR"), all_reduce_bandwidth=7e9)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("H100-80GB", "H100-SX", 7, "nodes[0].hardware: 'H100-SX' is not known; did you mean H100"),
        ("L40S", "L40", 16, "nodes[1].devices[0].hardware: 'L40' is not known; did you mean L40S"),
        ("Gen4 x4", "Gen9", 10, "nodes[0].nvme.hardware: 'Gen9' is not known; did you mean Gen3"),
        ("200GbE", "20GbE", 2, "network.hardware: '20GbE' is not known; did you mean"),
        ("10GbE", "wire", 3, "links[0].link: 'wire' is not known; there are NVLink3, NVLink4"),
        ("PCIe 4", "PCIe 9", 12, "nodes[1].link: 'PCIe 9' is not known; did you mean PCIe"),
        ("big-0", "big", 3, "links[0].nodes: big is no node; there are big-0, big-1, small"),
        ("count: 8", "count: 0", 8, "nodes[0].count: 0 cannot be; give 1 to 10000"),
        ("nodes: 2", "nodes: 99999", 6, "nodes[0].nodes: 99999 cannot be; give 1 to 10000"),
        ("ports: 4", "ports: -4", 2, "network.ports: -4 cannot be; give 1 to 10000"),
        ("ports: 4", "port: 4", 2, "network.port: unknown key; known are hardware, ports, band"),
        ("link: PCIe 4", "link: {ports: 2}", 12, "nodes[1].link.ports: unknown key; known are"),
        ("link: PCIe 4", "link: 4", 12, "nodes[1].link: must be a map, but is 4"),
        ("link: PCIe 4", "count: 2", 12, "nodes[1].count: stands beside devices; put it there"),
        (", link: 10GbE", "", 3, "links[0].link: missing; add what joins the nodes"),
        ("host_memory: 1TiB", "host_memory: 1XB", 9, "nodes[0].host_memory: '1XB' is not a size"),
        ("host_memory: 1TiB", "host_memory: -1", 9, "nodes[0].host_memory: -1 cannot be"),
        ("host_memory: 1TiB", "staged: true", 5, "nodes[0].host_memory: missing; add what"),
        ("capacity: 4TB", "capacity: -4", 10, "nodes[0].nvme.capacity: -4 cannot be; give 0 or"),
        (", capacity: 4TB", "", 10, "nodes[0].nvme.capacity: missing; add it"),
        ("read: 5e9, ", "", 14, "nodes[1].nvme.read: missing; add it, or hardware"),
        ("read: 5e9", "read: -5e9", 14, "nodes[1].nvme.read: -5000000000.0 cannot be; it must be"),
        ("device_memory: 9e11", "device_memory: -9", 21, "nodes[1].devices[1].bandwidths.device_"),
        ("device_bytes: 20GiB", "device_bytes: -1", 20, "nodes[1].devices[1].budget.device_bytes"),
        ("{device_bytes: 20GiB, host_bytes: 1GiB}", "5", 20, "nodes[1].devices[1].budget: must be"),
        ("hardware: RTX 4090", "count: 1", 21, "nodes[1].devices[1].bandwidths.host_to_device: mi"),
        ("name: odd", "colour: odd", 18, "nodes[1].devices[1].colour: unknown key; known are name"),
    ],
)
def test_nonsense_in_the_short_form_is_refused_with_its_line(
    old: str, new: str, line: int, said: str
) -> None:
    assert old in SHORT
    with pytest.raises(PlanError, match="^" + re.escape(f"line {line}: {said}")):
        ClusterSpec.from_yaml(SHORT.replace(old, new, 1))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["H100", "NVLink4", "Gen4", "1GiB", "-1", "1e9", "<<"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4) | st.integers(), st.integers(), max_size=2),
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    own = [(tree, key) for key, _ in inside]
    below = tree.values() if isinstance(tree, dict) else tree
    return own + [
        place for each in below if isinstance(each, dict | list) for place in places(each)
    ]


@settings(deadline=None)
@given(st.data())
def test_whatever_is_written_is_a_cluster_or_is_refused_with_a_line(data: st.DataObject) -> None:
    tree = yaml.safe_load(data.draw(st.sampled_from([GOOD, SHORT])))
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(places(tree)))
        if isinstance(container, dict) and data.draw(st.booleans()):
            container[data.draw(st.text(max_size=3))] = container.pop(key)
        else:
            container[key] = data.draw(JUNK)
    text = yaml.safe_dump(tree)
    try:
        cluster = ClusterSpec.from_yaml(text)
    except PlanError as error:
        said = re.match(r"line (\d+): ", str(error))
        assert said is not None
        assert 1 <= int(said[1]) <= text.count("\n") + 1
    else:
        assert ClusterSpec.from_yaml(yaml.safe_dump(encode(cluster))) == cluster


def test_unlike_devices_have_no_usual_link() -> None:
    alike = SHORT.replace("    link: PCIe 4\n", "")
    assert ClusterSpec.from_yaml(alike) == ClusterSpec.from_yaml(SHORT)
    with pytest.raises(PlanError, match=r"^line 11: nodes\[1\].link: missing; add what joins"):
        ClusterSpec.from_yaml(alike.replace("L40S", "H100"))


def test_the_examples_are_clusters() -> None:
    folder = Path(__file__).resolve().parents[2] / "examples"
    counts = {path.name: ClusterSpec.from_yaml(path) for path in folder.glob("*.yaml")}
    assert {name: cluster.num_devices for name, cluster in counts.items()} == {
        "cluster.yaml": 40,
        "workstations.yaml": 4,
    }
