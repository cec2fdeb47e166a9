"""One replica: one engine, its gang of shards in one placement group, and the HTTP face."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.health_probe import HealthProbe
from deployments.loading import LoadingReport
from deployments.metrics import RayMetrics
from deployments.options import DeploymentOptions
from giantserve.api.app import create_app
from giantserve.config import EngineConfig
from giantserve.errors import EngineDeadError
from giantserve.planning import Resolution
from partition.calibration import machine_name

STATS_PERIOD_S = 5.0

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
        """Start the engine; returns when it takes requests, while the rest of the weights load.
        Raises what the engine raises."""
        from giantserve.async_engine import AsyncEngine

        self._options = options
        self._loading = LoadingReport(serve.get_replica_context().replica_id.to_full_id_str())
        try:
            resolution = planned.resolution if planned.machine == machine_name() else None
            self._engine = AsyncEngine(config, resolution=resolution, on_progress=self._loading)
        except BaseException:
            self._loading.close()
            raise
        self._metrics = RayMetrics(self._engine.model_name)
        self._tasks: list[asyncio.Task[None]] = []
        self._probe = HealthProbe(self._engine)
        reason = " ".join(self._engine.plan.reason.split())
        logger.info("serving %s: %s", self._engine.model_name, reason)

    def __serve_build_asgi_app__(self) -> FastAPI:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._report()), loop.create_task(self._watch_load())]
        return create_app(
            self._engine,
            api_key=self._options.api_key,
            max_body_bytes=self._options.max_body_bytes,
            metrics=self._metrics,
        )

    async def check_health(self) -> None:
        """Serve replaces a replica that cannot make a token."""
        await self._probe.check()

    async def stats(self) -> dict[str, Any]:
        """The engine's statistics, through a Serve handle."""
        return await self._engine.stats()

    async def _report(self) -> None:
        while self._engine.failure is None:
            try:
                self._metrics.engine_stats(await self._engine.stats())
            except EngineDeadError as error:
                logger.warning("no statistics: %s", error)
            await asyncio.sleep(STATS_PERIOD_S)

    async def _watch_load(self) -> None:
        """Say that the load is over, or what it failed with."""
        try:
            await self._engine.wait_until_loaded()
        except Exception as error:
            logger.exception("the model did not load")
            self._loading.fail(error)
        else:
            self._loading.finish()

    async def __del__(self) -> None:
        """Serve calls this after the replica has drained."""
        for task in self._tasks:
            task.cancel()
        self._probe.close()
        await self._engine.close()
        self._loading.close()
