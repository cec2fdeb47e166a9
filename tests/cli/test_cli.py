"""The command line, as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from giantserve.cli.doctor import conclusions
from giantserve.cli.main import app
from partition.machine import Gpu, Machine

COMMANDS = ("serve", "generate", "chat", "plan", "pack", "demo", "doctor")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from giantserve.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_teaches() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    assert all(command in text for command in COMMANDS)
    assert "giantserve serve ./my-model --device-memory 8GiB" in text
    for command in COMMANDS:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert f"giantserve {command}" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("serve", "/m", "--device-memory", "lots"), 1, "'device_memory': 'lots' is not a size"),
        (("plan", "/m", "--host-memory", "-1"), 1, "'host_memory': '-1' is not a size"),
        (("chat", "--url", "http://127.0.0.1:9", "--message", "x"), 1, "cannot talk to"),
        (("serve", "/m", "--port", "0"), 2, "--port"),
        (("serve", "/m", "--tensor-parallel", "x"), 2, "--tensor-parallel"),
        (("serve",), 2, "MODEL"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(
    arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.startswith("giantserve: ")
        assert done.stderr.count("\n") == 1


def test_serve_hands_over_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda path, command: handed.append((path, command)))
    monkeypatch.delenv("GIANTSERVE_API_KEY", raising=False)
    arguments = ["serve", "/m", "--port", "8123", "--device-memory", "2GiB", "--nvme-dir", "/n"]
    arguments += ["--pipeline-parallel", "2", "--api-key", "secret", "--no-prefix-caching"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    ((path, command),) = handed
    assert (path, command[:4]) == (sys.executable, [sys.executable, "-m", "deployments", "/m"])
    expected = {"device_memory=2GiB", "nvme_dir=/n", "pipeline_parallel=2", "--port=8123"}
    assert expected < set(command)
    assert "enable_prefix_caching=False" in command
    assert "secret" not in " ".join(command)
    assert os.environ.pop("GIANTSERVE_API_KEY") == "secret"

    from deployments.options import parse_args

    args = dict(pair.split("=", 1) for pair in command[4:] if not pair.startswith("--"))
    config, options = parse_args({"model": "/m", **args})
    assert (config.device_memory, config.enable_prefix_caching) == (2**31, False)
    assert options.num_replicas == 1


def test_doctor_says_what_binds(tmp_path: Path) -> None:
    large = replace(Machine.discover(tmp_path), available_bytes=2**33, memory_bytes=2**33, gpus=())
    small = replace(large, memory_bytes=2**32)
    device, memory, disk, attention = conclusions(small, tmp_path)
    assert "NVML sees no GPU" in device
    assert memory == "host memory: up to 4 GiB, what the cgroup's limit leaves"
    assert str(tmp_path) in disk
    assert attention.startswith("decode attention, norms and MLPs on the CPU: ")
    gpu = Gpu(name="x", total_bytes=1, free_bytes=1)
    device, memory, *_ = conclusions(replace(large, gpus=(gpu,)), tmp_path)
    assert device.startswith("device tier: 1 GPU(s)")
    assert memory == "host memory: up to 8 GiB, what the system has available"
