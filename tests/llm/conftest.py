"""A tiny Llama with a tokenizer, an engine that holds it, and transformers as the oracle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from giantserve import LLM
from giantserve.demo_tokenizer import train_tokenizer
from giantserve.executor.launcher import Launcher
from giantserve.tokenizer import Tokenizer
from tests.exactness.zoo import make_config

VOCAB_SIZE = 400


@pytest.fixture(scope="session", autouse=True)
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements of temporary folders are kept out of the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def nvme_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its random weights would hardly ever end a sequence by themselves: no token ends one."""
    path = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = make_config("llama")
    config.vocab_size, config.eos_token_id = VOCAB_SIZE, None
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    train_tokenizer(path, VOCAB_SIZE)
    return path


@pytest.fixture(scope="session")
def options(nvme_dir: Path, launcher: Launcher) -> dict[str, Any]:
    return {
        "device_memory": "64MiB",
        "host_memory": "16MiB",
        "nvme_dir": nvme_dir,
        "allow_unused_tiers": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "launcher": launcher,
    }


@pytest.fixture(scope="session")
def llm(model_path: Path, options: dict[str, Any]) -> Iterator[LLM]:
    with LLM(model_path, **options) as opened:
        yield opened


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(model_path)


@pytest.fixture(scope="session")
def oracle(model_path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def with_end_token(model_path: Path, folder: Path, token_id: int) -> Path:
    """The same model, in ``folder``, whose sequences end with ``token_id``."""
    folder.mkdir()
    for file in model_path.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (folder / file.name).symlink_to(file)
    config = json.loads((model_path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": token_id}))
    return folder
