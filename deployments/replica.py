"""One replica: one engine, its gang of shards in one placement group, and the HTTP face."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.loading import LoadingReport
from deployments.metrics import RayMetrics
from deployments.options import DeploymentOptions
from giantserve.api.app import create_app
from giantserve.config import EngineConfig
from giantserve.errors import EngineDeadError
from giantserve.planning import Resolution
from partition.calibration import machine_name

STATS_PERIOD_S = 5.0
TOKEN_PERIOD_S = 30.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class PlannedOn:
    """What was resolved, and the name of the machine for which this holds."""

    machine: str
    resolution: Resolution


@serve.deployment
@serve.ingress()
class Replica:
    """The ingress is in the same process as the engine: a token goes to the proxy in one hop."""

    def __init__(
        self, config: EngineConfig, options: DeploymentOptions, planned: PlannedOn
    ) -> None:
        """Load the model; returns when the engine can answer. Raises what the engine raises."""
        from giantserve.async_engine import AsyncEngine

        self._options = options
        loading = LoadingReport(serve.get_replica_context().replica_id.unique_id)
        try:
            resolution = planned.resolution if planned.machine == machine_name() else None
            self._engine = AsyncEngine(config, resolution=resolution, on_progress=loading)
        finally:
            loading.close()
        self._metrics = RayMetrics(self._engine.model_name)
        self._reporting: asyncio.Task[None] | None = None
        self._last_token_s = time.monotonic()
        reason = " ".join(self._engine.plan.reason.split())
        logger.info("serving %s: %s", self._engine.model_name, reason)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._reporting = asyncio.get_running_loop().create_task(self._report())
        return create_app(
            self._engine,
            api_key=self._options.api_key,
            max_body_bytes=self._options.max_body_bytes,
            metrics=self._metrics,
        )

    async def check_health(self) -> None:
        """Serve replaces a replica that cannot make a token.

        A dead engine is found at every check; a real token is asked for less often, since with
        weights on a disk it costs a pass over all of them.
        """
        if self._engine.failure is not None:
            raise EngineDeadError(str(self._engine.failure))
        if time.monotonic() - self._last_token_s >= TOKEN_PERIOD_S:
            await self._engine.check_health()
            self._last_token_s = time.monotonic()

    async def stats(self) -> dict[str, Any]:
        """The engine's statistics, through a Serve handle."""
        return await self._engine.stats()

    async def _report(self) -> None:
        while self._engine.failure is None:
            self._metrics.engine_stats(await self._engine.stats())
            await asyncio.sleep(STATS_PERIOD_S)

    async def __del__(self) -> None:
        """Serve calls this after the replica has drained."""
        if self._reporting is not None:
            self._reporting.cancel()
        await self._engine.close()
