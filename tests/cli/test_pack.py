"""``giantserve pack``: the store is there before anyone serves from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from giantserve import LLM, SamplingParams
from giantserve.cli.main import app
from giantserve.demo.checkpoint import write_checkpoint
from giantserve.demo.shape import DemoShape
from giantserve.executor.launcher import Launcher
from kvcache.tier import Tier

SHAPE = DemoShape(
    name="tiny",
    hidden_size=256,
    intermediate_size=512,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=400,
    device_memory="3MiB",
    host_memory="0",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "model"
    write_checkpoint(SHAPE, folder, lambda done, total: None)
    return folder


def options(nvme_dir: Path) -> dict[str, object]:
    return {
        "device_memory": SHAPE.device_memory,
        "host_memory": SHAPE.host_memory,
        "nvme_dir": nvme_dir,
        "pipeline_parallel": 2,
        "max_model_len": 64,
        "max_num_seqs": 1,
    }


def words(model: Path, nvme_dir: Path) -> list[str]:
    given = options(nvme_dir).items()
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given]
    return ["pack", str(model), *(word for pair in pairs for word in pair)]


def packed(model: Path, nvme_dir: Path) -> str:
    done = CliRunner().invoke(app, words(model, nvme_dir))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_an_engine_finds_what_was_packed(model: Path, tmp_path: Path, launcher: Launcher) -> None:
    said = packed(model, tmp_path)
    stores = sorted((tmp_path / "weights").glob("*.weights"))
    assert stores
    for store in stores:
        assert str(store) in said
    written = [os.stat(store).st_mtime_ns for store in stores]
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM(model, launcher=launcher, **options(tmp_path)) as llm:  # type: ignore[arg-type]
        held = [shard.weight_bytes(Tier.NVME) for shard in llm.plan.shards]
        held = [num_bytes for num_bytes in held if num_bytes]
        for num_bytes, store in zip(held, stores, strict=True):
            assert num_bytes <= store.stat().st_size
        assert len(llm.generate([[3, 4, 5]], greedy)[0].token_ids) == 4
    assert [os.stat(store).st_mtime_ns for store in stores] == written
    assert packed(model, tmp_path) == said
    assert [os.stat(store).st_mtime_ns for store in stores] == written


def test_a_plan_without_nvme_has_nothing_to_pack(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pack", str(model), "--nvme-dir", str(tmp_path)])
    assert done.exit_code == 0
    assert "shard 0: the plan keeps no weights on NVMe" in done.stdout
    assert not list(tmp_path.rglob("*.weights"))


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pack", str(tmp_path / "absent")])
    assert done.exit_code == 1
    assert "is not a folder" in str(done.exception)


def test_a_store_that_cannot_be_used_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir(mode=0o755)
    done = subprocess.run(
        [sys.executable, "-m", "giantserve", *words(model, tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("giantserve: ") and "chmod 700" in done.stderr
