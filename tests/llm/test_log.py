"""What an engine says when it starts, to a program that has not set up logging."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from giantserve import LLM
from giantserve.executor.launcher import Launcher


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
            lines = [line for line in capsys.readouterr().err.splitlines() if "plan:" in line]
            assert lines == [f"giantserve.engine: plan: {reason}"]
        assert "TP 1 x PP 1" in reason and "binds, 3 sequences decode at " in reason
    finally:
        logger.setLevel(before)
