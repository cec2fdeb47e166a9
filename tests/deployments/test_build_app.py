"""Arguments, placement, settings and the YAML files. No cluster is started."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deployments.__main__ import _delete_app
from deployments.metrics import flatten
from deployments.options import DeploymentOptions, parse_args
from deployments.placement import gpus_per_shard, missing
from deployments.port import held_port
from deployments.tuning import PORT_SETTINGS, SERVE_SETTINGS, tune
from giantserve.config import EngineConfig
from giantserve.errors import ConfigError
from giantserve.free_ports import free_port

CONFIGS = sorted((Path(__file__).parents[2] / "deployments" / "configs").glob("*.yaml"))


def test_text_and_values_give_the_same_options() -> None:
    text = {
        "model": "/m",
        "device_memory": "256MiB",
        "pipeline_parallel": "2",
        "enable_prefix_caching": "false",
        "nvme_dir": "/n",
        "num_replicas": "3",
        "max_body_bytes": "1MiB",
        "api_key": "k",
    }
    values = {
        "model": "/m",
        "device_memory": 2**28,
        "pipeline_parallel": 2,
        "enable_prefix_caching": False,
        "nvme_dir": Path("/n"),
        "num_replicas": 3,
        "max_body_bytes": 2**20,
        "api_key": "k",
    }
    assert parse_args(text) == parse_args(values)
    config, options = parse_args(text)
    assert config == EngineConfig(
        model="/m",
        device_memory=2**28,
        pipeline_parallel=2,
        enable_prefix_caching=False,
        nvme_dir=Path("/n"),
    )
    assert options == DeploymentOptions(num_replicas=3, max_body_bytes=2**20, api_key="k")
    assert "k'" not in repr(options)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            {"model": "/m", "device_memroy": "1GiB"},
            "unknown option 'device_memroy'; there are allow_",
        ),
        ({}, "option 'model' is missing"),
        ({"model": "/m", "device_memory": "lots"}, "option 'device_memory': 'lots' is not a size"),
        ({"model": "/m", "num_replicas": "0"}, "option 'num_replicas': '0' is too small"),
        ({"model": "/m", "seed": "x"}, "option 'seed': 'x' is not a whole number"),
        ({"model": "/m", "trust_remote_code": "maybe"}, "neither true nor false"),
        ({"model": "/m", "cpus_per_shard": "-1"}, "must be at least 0"),
        ({"model": ""}, "option 'model': '' is not a text"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert says in str(caught.value)


def test_the_api_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTSERVE_API_KEY", "from-environment")
    assert parse_args({"model": "/m"})[1].api_key == "from-environment"
    assert parse_args({"model": "/m", "api_key": "given"})[1].api_key == "given"


def test_gpus_follow_the_device_unless_they_are_given() -> None:
    cuda, cpu = EngineConfig(model="m", device="cuda"), EngineConfig(model="m", device="cpu")
    assert gpus_per_shard(cuda, DeploymentOptions()) == 1.0
    assert gpus_per_shard(cpu, DeploymentOptions()) == 0.0
    assert gpus_per_shard(cuda, DeploymentOptions(gpus_per_shard=0.5)) == 0.5


def test_what_a_cluster_lacks_for_all_bundles() -> None:
    bundles = [{"CPU": 0.1}, {"CPU": 0.3, "GPU": 1.0}, {"CPU": 0.3, "GPU": 1.0}] * 2
    assert missing(bundles, {"CPU": 1.4, "GPU": 4.0}) == ""
    assert missing(bundles, {"CPU": 8.0, "GPU": 1.0}) == "4 GPUs where the cluster has 1"
    assert missing(bundles, {"CPU": 1.0}) == (
        "1.4 CPUs where the cluster has 1 and 4 GPUs where the cluster has 0"
    )
    assert missing([{"CPU": 0.1}] * 30, {"CPU": 3.0}) == "", "0.1 is not a binary fraction"


def test_replicas_that_take_long_to_end_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Serve's own wait is a minute, whatever they may take."""
    clock_s = [0.0]
    tried: list[float] = []

    def delete(name: str) -> None:
        tried.append(clock_s[0])
        clock_s[0] += 60.0
        raise TimeoutError("not deleted after 60s")

    monkeypatch.setattr(serve, "delete", delete)
    monkeypatch.setattr(time, "monotonic", lambda: clock_s[0])
    _delete_app(drain_timeout_s=100.0)
    assert tried == [0.0, 60.0]
    assert "have not ended in time" in caplog.text


def test_settings_leave_the_users_alone() -> None:
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    tune(environment)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert set(environment) == {*SERVE_SETTINGS, *PORT_SETTINGS}
    assert len({environment[name] for name in PORT_SETTINGS}) == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.stem))
def test_configs_are_valid(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = schema.applications
    assert application.import_path == "deployments.app:build_app"
    config, _ = parse_args(application.args)
    assert config.model == "/models/my-model"


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 2


def test_stats_flatten_to_numbers() -> None:
    stats = {"running": 2, "bytes": {"host": {"read": 5}}, "rates": [0.5], "name": "x"}
    assert dict(flatten(stats)) == {"running": 2.0, "bytes.host.read": 5.0, "rates.0": 0.5}


def test_a_taken_port_is_one_line_before_anything_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "deployments", "/no/model", f"--port={port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port\n"
    )


def test_an_ipv6_host_is_refused() -> None:
    """HAProxy would listen on IPv4 alone."""
    for host in ("::", "::1"):
        with (
            pytest.raises(ConfigError, match=f"host '{host}' is an IPv6 address"),
            held_port(host, free_port()),
        ):
            pass


def test_servers_that_start_together_do_not_share_a_port() -> None:
    port = free_port()
    command = [sys.executable, "-m", "deployments", "/no/model", f"--port={port}"]
    with held_port("127.0.0.1", port):  # nothing listens yet, as while a model loads
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port\n"
    )
    with held_port("127.0.0.1", port):
        pass
