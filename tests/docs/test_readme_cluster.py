"""The README's commands for a Ray cluster, on a head node of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest
from newcomer import ROOT, Newcomer, readme_commands

from giantserve.free_ports import free_ports

START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head node, and someone in ./my-model's folder who talks to it."""

    newcomer: Newcomer
    environment: dict[str, str]

    def popen(self, command: list[str], output: Path) -> subprocess.Popen[bytes]:
        with output.open("wb") as stream:
            return subprocess.Popen(
                command,
                cwd=self.newcomer.folder,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.newcomer.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, path: str) -> int:
        """The HTTP status of a GET; 0 where nobody listens."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.newcomer.port}{path}").status_code
        except httpx.HTTPError:
            return 0

    def completion(self, model: str) -> str:
        """The text of a few tokens. The proxy answers 404 until it knows of the replica."""
        body = {"model": model, "prompt": "Once", "max_tokens": 4, "temperature": 0}
        url = f"http://127.0.0.1:{self.newcomer.port}/v1/completions"
        answer = httpx.post(url, json={**body, "ignore_eos": True}, timeout=60.0)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        return str(answer.json()["choices"][0]["text"])


def _wait_until(what: str, holds: Callable[[], bool], said: Path) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while not holds():
        assert time.monotonic() < give_up_s, f"waited in vain until {what}: {said.read_text()}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def head(newcomer: Newcomer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` as the README has it, with ports and a folder that nobody else has."""
    http, gcs, dashboard, agent, client, stats, metrics = free_ports(7)
    newcomer = replace(newcomer, port=str(http))  # beside the server of the other documents
    (exports,) = readme_commands("export")
    folder = tmp_path_factory.mktemp("head")
    environment = {
        **newcomer.environment,
        **dict(word.split("=", 1) for word in exports[1:]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    }
    known = Head(newcomer, environment)
    (start,) = (words for words in readme_commands("ray") if words[1] == "start")
    process = known.popen(
        [
            *start,
            "--block",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            "--num-cpus=4",
            f"--object-store-memory={128 << 20}",
            f"--temp-dir={folder}",
        ],
        folder / "said",
    )
    environment["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
    environment["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until("the head is up", lambda: _listens(dashboard), folder / "said")
        known.run(["serve", "start", f"--http-port={newcomer.port}"])
        yield known
    finally:
        root = psutil.Process(process.pid)
        family = root.children(recursive=True)
        process.terminate()
        process.wait(60)
        psutil.wait_procs(family, timeout=20)
        for left in (child for child in family if child.is_running()):
            left.kill()


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False


def test_serve_run_serves_until_it_is_interrupted(head: Head, tmp_path: Path) -> None:
    (command,) = (words for words in readme_commands("serve") if words[1] == "run")
    process = head.popen(command, tmp_path / "said")
    try:
        _wait_until("it answers", lambda: head.status("/v1/models") == 200, tmp_path / "said")
        assert head.completion("./my-model")
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    assert head.status("/v1/models") != 200


def test_serve_deploy_keeps_a_file_up(head: Head, tmp_path: Path) -> None:
    (command,) = (words for words in readme_commands("serve") if words[1] == "deploy")
    config = head.newcomer.folder / command[2]
    config.parent.mkdir(parents=True)
    shutil.copy(ROOT / command[2], config)
    text = config.read_text().replace("/models/my-model", str(head.newcomer.folder / "my-model"))
    config.write_text(head.newcomer.here(text))
    head.run(command)
    commands = {words[1]: words for words in readme_commands("serve")}
    said = tmp_path / "said"
    said.write_text("nothing")

    def runs() -> bool:
        if head.status("/v1/models") != 200:
            return False
        said.write_text(head.run(commands["status"]))
        return "status: RUNNING" in said.read_text()

    _wait_until("it runs and answers", runs, said)
    assert head.completion(str(head.newcomer.folder / "my-model"))
    head.run(commands["shutdown"])
    assert head.status("/v1/models") != 200


def test_a_cluster_is_measured_and_planned_for(head: Head) -> None:
    commands = readme_commands("giantserve", "docs/planning.md")
    measure, plan = (words for words in commands if "my-cluster.yaml" in words)
    assert "NUMA node(s)" in head.run(measure)
    assert "forecast:" in head.run(plan)
