"""The demonstration on its small model: what it prints, and that nothing stays when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors

from giantserve.demo.checkpoint import write_checkpoint
from giantserve.demo.shape import SHAPES
from giantserve.errors import ConfigError
from giantserve.options import engine_config
from giantserve.planning import plan_for
from kvcache.tier import Tier

COMMAND = [sys.executable, "-c", "from giantserve.cli import main; main()", "demo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "--folder", str(folder), "--model-size", "small", *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_about(folder: Path) -> list[psutil.Process]:
    """The server and whatever else was started with the folder in its command or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            known = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(folder) in text for text in known):
            found.append(process)
    return found


def test_it_serves_and_leaves_nothing(folder: Path) -> None:
    first = start(folder)
    said, complained = first.communicate(timeout=280)
    assert first.returncode == 0, complained
    for promised in ("noise", "The plan", "tokens/s", "first token after", "moved disk to", "this"):
        assert promised in said
    assert "nothing is left running" in said
    assert processes_about(folder) == []
    written = {path: path.stat().st_mtime_ns for path in folder.glob("small-*/**/*.weights")}
    assert len(written) == 2


def test_interrupted_while_it_answers_the_second_time(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("small-*/**/*.weights")}
    process = start(folder)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "answers after" in line:
            break
    after = {path: path.stat().st_mtime_ns for path in folder.glob("small-*/**/*.weights")}
    assert any("is there from last time" in line for line in said)
    assert before.items() <= after.items()
    interrupt_and_check(process, signal.SIGINT, folder)


def test_terminated_while_it_starts(folder: Path) -> None:
    process = start(folder)
    deadline = time.monotonic() + 200
    while len(processes_about(folder)) < 6:  # Ray and its workers are on their way up
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    interrupt_and_check(process, signal.SIGTERM, folder)


def interrupt_and_check(
    process: subprocess.Popen[str], number: signal.Signals, folder: Path
) -> None:
    process.send_signal(number)
    said, complained = process.communicate(timeout=90)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; nothing is left running"
    assert "Traceback" not in complained
    assert processes_about(folder) == []


def test_an_unknown_size_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--model-size", "huge"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "giantserve: model size 'huge' is unknown; there are full, small\n"
    assert list(tmp_path.iterdir()) == []


def test_the_small_checkpoint_is_whole_and_a_third_of_it_fits_only_on_the_disk(
    tmp_path: Path,
) -> None:
    shape, model = SHAPES["small"], tmp_path / "model"
    progress: list[tuple[int, int]] = []
    write_checkpoint(shape, model, lambda done, total: progress.append((done, total)))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    stored = 0
    for file in set(index["weight_map"].values()):
        with safetensors.safe_open(model / file, "pt") as opened:
            stored += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert stored == index["metadata"]["total_size"] == progress[-1][0] == progress[-1][1]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    plan = plan_for(
        engine_config(
            {
                "model": str(model),
                "device_memory": shape.device_memory,
                "host_memory": shape.host_memory,
                "nvme_dir": tmp_path,
                "pipeline_parallel": 2,
                "max_num_seqs": 8,
                "max_model_len": 512,
            }
        )
    )
    assert sum(shard.weight_bytes(Tier.NVME) for shard in plan.shards) > stored / 3


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"cannot write .*taken/model: Not a directory"):
        write_checkpoint(SHAPES["small"], taken / "model", lambda done, total: None)
