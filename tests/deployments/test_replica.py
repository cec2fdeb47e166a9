"""The tasks of a replica, without a cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import replica as replica_module
from deployments.replica import Replica
from giantserve.errors import EngineDeadError


def test_statistics_go_on_after_some_were_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replica_module, "STATS_PERIOD_S", 0.0)
    answers: list[dict[str, Any] | None] = [{"running": 1}, None, {"running": 2}]
    told: list[dict[str, Any]] = []

    async def stats() -> dict[str, Any]:
        answer = answers.pop(0)
        if not answers:
            engine.failure = EngineDeadError("the engine was closed")
        if answer is None:
            raise EngineDeadError("the engine did not answer within 10 s")
        return answer

    engine = SimpleNamespace(failure=None, stats=stats)
    alone = SimpleNamespace(_engine=engine, _metrics=SimpleNamespace(engine_stats=told.append))
    asyncio.run(Replica.func_or_class._report(alone))  # type: ignore[attr-defined]
    assert told == [{"running": 1}, {"running": 2}]
    assert "did not answer within 10 s" in caplog.text
