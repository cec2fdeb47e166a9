"""``giantserve plan`` for machines that are not there: a config and a cluster file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from giantserve.cli import plan_page
from giantserve.cli.main import app
from giantserve.errors import ConfigError
from giantserve.options import engine_config
from giantserve.planning import problem_on
from kvcache.tier import Tier
from partition import ClusterSpec, Objective, PartitionPlan, PlanError
from partition.memory_use import KINDS

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
RATES = """
      device_memory: 2.0e+10
      host_to_device: 1.0e+10
      device_to_host: 1.0e+10
      disk_read: 1.0e+9
      disk_write: 1.0e+9
      gemm: [{rows: 1, flops_per_s: 1.0e+12}]
"""
CLUSTER = f"""
network: {{bandwidth: 1.0e+9, latency_s: 1.0e-5}}
nodes:
- name: big
  link: {{bandwidth: 1.0e+10, latency_s: 1.0e-6}}
  devices:
  - &device
    budget: {{device_bytes: 300KiB, host_bytes: 64KiB, nvme_bytes: 1GiB}}
    bandwidths: {RATES}
  - *device
- name: small
  link: {{bandwidth: 1.0e+10, latency_s: 1.0e-6}}
  devices: [*device, *device]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a config.json, in a folder whose name is a trap."""
    folder = tmp_path_factory.mktemp("models") / '<b>&"'
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clusters") / "cluster.yaml"
    file.write_text(CLUSTER)
    return file


OPTIONS = (
    *("--tensor-parallel", "2", "--pipeline-parallel", "2"),
    *("--prompt-tokens", "64", "--output-tokens", "32", "--concurrency", "4"),
)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exception is None, result.exception
    return result.output


def test_json_is_the_plan_of_that_cluster(model: Path, cluster: Path) -> None:
    plan = PartitionPlan.from_json(run(model, "--cluster", cluster, *OPTIONS, "--json"))
    assert (plan.model, plan.tensor_parallel, plan.pipeline_parallel) == (str(model), 2, 2)
    assert {shard.budget.device_bytes for shard in plan.shards} == {300 << 10}
    assert {shard.node for shard in plan.shards} == {"big", "small"}
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_the_table_tells_the_plan(model: Path, cluster: Path) -> None:
    text = run(model, "--cluster", cluster, *OPTIONS)
    plan = PartitionPlan.from_json(run(model, "--cluster", cluster, *OPTIONS, "--json"))
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in text.splitlines()]
    stages = [row for row in cells if len(row) == 8 and row[2] == "device"]
    shown = [(row[0], row[1], row[7]) for row in stages]
    expected = []
    for stage in plan.stages:
        used = sum(shard.used_bytes(Tier.DEVICE) for shard in stage.shards)
        budget = sum(shard.budget.device_bytes for shard in stage.shards)
        layers = f"{stage.first_layer}-{stage.end_layer - 1}"
        expected.append((str(stage.index), layers, f"{100 * used / budget:.0f} %"))
    assert shown == expected
    values = dict(row for row in cells if len(row) == 2)
    assert values["throughput"] == f"{plan.forecast.tokens_per_s:.4g} tokens/s"
    assert values["binds"] == plan.forecast.binds
    assert "forecast: TP 2 x PP 2" in text
    assert "stage 0 waits for the " in text.split("Runners-up")[1]
    assert re.search(r"^would change it: 2x as many sequences at once: \d", text, re.M)


class Page(HTMLParser):
    """Every element closed in order; the text; the attributes by name."""

    EMPTY = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


def test_the_page_tells_the_plan_and_needs_nothing_else(
    model: Path, cluster: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.html"
    plan = PartitionPlan.from_json(
        run(model, "--cluster", cluster, *OPTIONS, "--json", "--html", file)
    )
    text = file.read_text()
    page = Page(text)
    assert page.open == []
    assert "b" not in page.tags and "script" not in page.tags
    assert {name for name, _ in page.attributes}.isdisjoint({"src", "href"})
    assert not re.search(r"url\(|@import|https?:", text)
    words = " ".join(page.words)
    assert f"Plan of {model}" in words
    assert all(f"{shard.node}/{shard.device}" in words for shard in plan.shards)
    assert f"{plan.forecast.tokens_per_s:.4g} tokens/s" in words
    assert plan.forecast.binds in words
    labels = [value or "" for name, value in page.attributes if name == "aria-label"]
    full = {
        f"({100 * shard.used_bytes(Tier.DEVICE) / shard.budget.device_bytes:.0f} %)"
        for shard in plan.shards
    }
    shown = {label.rpartition(" of ")[2] for label in labels if label.startswith("device:")}
    assert {label[label.index("(") :] for label in shown} == full
    units = {p.unit for shard in plan.shards for p in shard.placements if p.tier is Tier.DEVICE}
    drawn = [word for word in page.words if ": compute " in word]
    assert {word.split(": ")[0] for word in drawn} >= units - {"embedding"}
    assert {"Runners-up", "What would change it", "2x as many sequences at once"} <= set(page.words)
    assert page.tags.count("svg") == plan.pipeline_parallel


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device_memory", "1GiB"),
        ("host_memory", "1GiB"),
        ("nvme_memory", "1GiB"),
        ("nvme_dir", "/n"),
        ("device", "cpu"),
        ("threads_per_shard", 1),
    ],
)
def test_what_the_cluster_says_cannot_be_said_again(
    model: Path, option: str, value: object
) -> None:
    config = engine_config({"model": str(model), option: value})
    with pytest.raises(ConfigError, match=rf"^{option} is .* leave {option} out"):
        problem_on(ClusterSpec.from_yaml(CLUSTER), config)


def test_every_kind_of_memory_has_a_colour_on_the_page() -> None:
    style = (Path(plan_page.__file__).parent / "plan_page.html").read_text()
    for kind in KINDS:
        (variable,) = re.findall(rf"\.{kind} {{ background: var\((--[a-z-]+)\)", style)
        assert style.count(f"{variable}: #") == 2, f"{kind}: once for light and once for dark"


def test_the_workload_and_the_objective_reach_the_planner(model: Path) -> None:
    spec = ClusterSpec.from_yaml(CLUSTER)
    given = {"prompt_tokens": 100, "output_tokens": "7", "concurrency": 3, "tpot_limit_s": 2.5}
    config = engine_config({"model": str(model), **given, "objective": "least_devices"})
    problem = problem_on(spec, config)
    workload = problem.workload
    assert (workload.prompt_tokens, workload.output_tokens, workload.concurrency) == (100, 7, 3)
    assert (workload.ttft_limit_s, workload.tpot_limit_s) == (None, 2.5)
    assert problem.objective is Objective.LEAST_DEVICES
    assert len(problem.plan().shards) == 1
    with pytest.raises(ConfigError, match=r"objective is 'speed'; there are .*min_tpot"):
        problem_on(spec, engine_config({"model": str(model), "objective": "speed"}))
    with pytest.raises(PlanError, match="tpot_limit_s is 0"):
        problem_on(spec, engine_config({"model": str(model), "tpot_limit_s": 0}))
