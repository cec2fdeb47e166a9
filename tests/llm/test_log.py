"""What an engine says when it starts, to a program that has not set up logging."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from giantserve import LLM
from giantserve.executor.launcher import Launcher


def test_one_line_says_what_was_planned_and_why(
    model_path: Path,
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
            with LLM(model_path, max_num_seqs=3, launcher=launcher) as llm:
                reason = llm.plan.reason
            said = capsys.readouterr().err.splitlines()
            assert [line for line in said if ": plan: " in line] == [
                f"giantserve.engine: plan: {reason}"
            ]
            (loaded,) = (line for line in said if ": loaded: " in line)
            assert loaded.endswith("nvme 0 B") and ": device 0 B" not in loaded
        assert "TP 1 x PP 1" in reason and "binds, 3 sequences decode at " in reason
    finally:
        logger.setLevel(before)
