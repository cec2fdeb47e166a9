"""A tiny model that each test may copy and break."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from tests.exactness.plans import make_plan
from tests.exactness.zoo import make_prompts, reference, save_model

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPTS = make_prompts((6, 19, 33))


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
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def expected(pristine: Path) -> list[list[int]]:
    return reference(pristine, PROMPTS, 16)


@pytest.fixture
def model_path(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the model at a path of its own."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose disk is measured once for all tests."""
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture
def nvme_dir(disk: Path) -> Path:
    """The folder without any store in it."""
    shutil.rmtree(disk / "weights", ignore_errors=True)
    return disk


Opener = Callable[..., LLM]


@pytest.fixture
def open_llm(pristine: Path, launcher: Launcher) -> Opener:
    """Opens a model with every layer on NVMe, so that each pass reads the store."""

    def opened(path: Path, nvme_dir: Path, pipeline_parallel: int = 1, **options: Any) -> LLM:
        plan = make_plan(pristine, 1, pipeline_parallel, "nvme", device_blocks=64, host_blocks=0)
        plan = replace(plan, model=str(path))
        return LLM(path, plan=plan, nvme_dir=nvme_dir, **{"launcher": launcher, **options})

    return opened


def tokens(llm: LLM) -> list[list[int]]:
    """What the engine continues the prompts with."""
    return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
