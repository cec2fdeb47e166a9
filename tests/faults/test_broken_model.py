"""Checkpoints that are broken in the ways downloads break: refused in one line, nothing started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import transformers

from giantserve import LLM
from giantserve.errors import GiantserveError
from giantserve.executor.launcher import Launcher
from partition.errors import BudgetError, PlanError
from tests.exactness.zoo import reference
from tests.faults.conftest import PROMPTS, Opener, tokens


def cut(path: Path) -> None:
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 100)


def cut_in_header(path: Path) -> None:
    os.truncate(path / "model.safetensors", 50)


def empty(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def garbage_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(os.urandom(4096))


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def garbage_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "lla')


def binary_config(path: Path) -> None:
    (path / "config.json").write_bytes(b"\xff\xfe\x00garbage\x80")


def list_config(path: Path) -> None:
    (path / "config.json").write_text("[1, 2]")


def unknown_model_type(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "no-such-model"}')


def no_model_type(path: Path) -> None:
    (path / "config.json").write_text("{}")


def other_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))


def more_layers(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))


def absurd_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))


def garbage_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


BREAKS: list[tuple[Callable[[Path], None], str]] = [
    (cut, "truncated: 100 of"),
    (cut_in_header, "truncated"),
    (empty, "truncated or no safetensors file"),
    (no_weights, "has neither model.safetensors nor"),
    (garbage_weights, "safetensors"),
    (no_config, "config.json"),
    (garbage_config, "config.json"),
    (binary_config, "config.json"),
    (list_config, "config.json"),
    (unknown_model_type, "no-such-model"),
    (no_model_type, "model_type"),
    (other_config, "by its config.json"),
    (more_layers, "lacks"),
    (absurd_config, "hidden_size"),
    (garbage_tokenizer, "tokenizer"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS, ids=[d.__name__ for d, _ in BREAKS])
def test_a_broken_checkpoint_is_refused(
    damage: Callable[[Path], None],
    message: str,
    model_path: Path,
    launcher: Launcher,
) -> None:
    damage(model_path)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises((GiantserveError, PlanError), match=message) as caught:
        LLM(model_path, device_memory="64MiB", launcher=launcher).close()
    assert str(model_path) in str(caught.value) or message == "by its config.json"
    assert len(str(caught.value)) < 600
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before


def test_a_missing_file_of_a_sharded_checkpoint_is_named(
    model_path: Path, launcher: Launcher, expected: list[list[int]]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    (model_path / "model.safetensors").unlink()
    model.save_pretrained(model_path, max_shard_size="200KB")
    parts = sorted(model_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    options = {"device_memory": "64MiB", "launcher": launcher}
    with LLM(model_path, **options) as whole:
        assert tokens(whole) == expected
    parts[1].unlink()
    with pytest.raises(GiantserveError, match=f"{parts[1].name} is missing"):
        LLM(model_path, **options).close()


def test_the_smallest_budget_named_is_one_that_works(
    pristine: Path, nvme_dir: Path, launcher: Launcher, expected: list[list[int]]
) -> None:
    options = {
        "host_memory": 0,
        "nvme_memory": "64MiB",
        "nvme_dir": nvme_dir,
        "launcher": launcher,
        "max_model_len": 64,
    }
    with pytest.raises(BudgetError) as caught:
        LLM(pristine, device_memory="40KiB", **options).close()
    smallest = caught.value.smallest["device_bytes"]
    assert any(character.isdigit() for character in str(caught.value))
    with LLM(pristine, device_memory=smallest, **options) as llm:
        assert tokens(llm) == expected
    with pytest.raises(BudgetError):
        LLM(pristine, device_memory=smallest - 4096, **options).close()


def test_a_model_replaced_under_its_path_is_packed_anew(
    model_path: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    with open_llm(model_path, nvme_dir) as llm:
        assert tokens(llm) == expected
    weights = model_path / "model.safetensors"
    times = weights.stat()
    config = transformers.AutoConfig.from_pretrained(model_path)
    transformers.set_seed(123)
    other = transformers.AutoModelForCausalLM.from_config(config)
    other.save_pretrained(model_path)
    assert weights.stat().st_size == times.st_size
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p or tar would
    os.utime(model_path / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    replaced = reference(model_path, PROMPTS, 16)
    assert replaced != expected
    with open_llm(model_path, nvme_dir) as llm:
        assert tokens(llm) == replaced
