"""One replica: one engine, its gang of shards in one placement group, and the HTTP face."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.metrics import RayMetrics
from deployments.options import DeploymentOptions
from giantserve.api.app import create_app
from giantserve.config import EngineConfig

STATS_PERIOD_S = 5.0

logger = logging.getLogger("ray.serve")


@serve.deployment
@serve.ingress()
class Replica:
    """The ingress is in the same process as the engine: a token goes to the proxy in one hop."""

    def __init__(self, config: EngineConfig, options: DeploymentOptions) -> None:
        """Load the model; returns when the engine can answer. Raises what the engine raises."""
        from giantserve.async_engine import AsyncEngine

        self._options = options
        self._engine = AsyncEngine(config)
        self._metrics = RayMetrics(self._engine.model_name)
        self._reporting: asyncio.Task[None] | None = None
        logger.info("serving %s", self._engine.model_name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._reporting = asyncio.get_running_loop().create_task(self._report())
        return create_app(
            self._engine,
            api_key=self._options.api_key,
            max_body_bytes=self._options.max_body_bytes,
            metrics=self._metrics,
        )

    async def check_health(self) -> None:
        """Serve replaces a replica that cannot make a token."""
        await self._engine.check_health()

    async def stats(self) -> dict[str, Any]:
        """The engine's statistics, through a Serve handle."""
        return await self._engine.stats()

    async def _report(self) -> None:
        while True:
            self._metrics.engine_stats(await self._engine.stats())
            await asyncio.sleep(STATS_PERIOD_S)

    async def __del__(self) -> None:
        """Serve calls this after the replica has drained."""
        if self._reporting is not None:
            self._reporting.cancel()
        await self._engine.close()
