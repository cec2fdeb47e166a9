"""What an engine says when it starts, to a program that has not set up logging."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from giantserve import LLM
from giantserve.config import EngineConfig
from giantserve.engine import unused_tiers
from giantserve.executor.launcher import Launcher
from tests.exactness.plans import make_plan


def test_one_line_says_what_was_planned_and_why(
    model_path: Path,
    nvme_dir: Path,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("giantserve")
    before = logger.level
    monkeypatch.setattr(logger, "handlers", [])
    try:
        for _ in range(2):
            with LLM(model_path, nvme_dir=nvme_dir, max_num_seqs=3, launcher=launcher) as llm:
                reason = llm.plan.reason
            said = capsys.readouterr().err
            lines = [line for line in said.splitlines() if ": plan: " in line]
            assert lines == [f"giantserve.engine: plan: {reason}"]
            assert f"nvme_dir is {nvme_dir}, but nothing lies on the nvme tier" in said
        assert "TP 1 x PP 1" in reason and "binds, 3 sequences decode at " in reason
    finally:
        logger.setLevel(before)


def test_tiers_that_hold_something_are_not_mentioned(model_path: Path) -> None:
    plan = make_plan(model_path, 1, 1, "mixed", device_blocks=8, host_blocks=0)
    given = EngineConfig(model=str(model_path), host_memory=1 << 20, nvme_dir=model_path)
    assert unused_tiers(given, plan) == []
    resident = make_plan(model_path, 1, 1, "device", device_blocks=8, host_blocks=0)
    (line,) = unused_tiers(given, resident)
    assert line.startswith(f"nvme_dir is {model_path}, but nothing lies on the nvme tier")
    assert unused_tiers(EngineConfig(model=str(model_path)), resident) == []
