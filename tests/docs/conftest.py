"""A tiny model called ./my-model, and one server of it, started by the README's own command."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from newcomer import ROOT, Newcomer, readme_commands

from giantserve.demo.checkpoint import write_checkpoint
from giantserve.demo.shape import DemoShape
from giantserve.free_ports import free_port

TINY = DemoShape(
    name="tiny",
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=400,
    device_memory="1MiB",
    host_memory="1MiB",
)


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    folder = tmp_path_factory.mktemp("newcomer")
    write_checkpoint(TINY, folder / "my-model", lambda done, total: None)
    shutil.copytree(ROOT / "examples", folder / "examples")
    return Newcomer(folder, str(free_port()))


@pytest.fixture(scope="session")
def server(newcomer: Newcomer) -> Iterator[Newcomer]:
    (command,) = (words for words in readme_commands("giantserve") if words[1] == "serve")
    process = subprocess.Popen(
        [newcomer.here(word) for word in command],
        cwd=newcomer.folder,
        env=newcomer.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"ready: http://127.0.0.1:{newcomer.port}/v1")
        yield newcomer
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        process.stdout.close()
