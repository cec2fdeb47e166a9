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
PROBE_WAIT_S = 1.0

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
        self._probe: asyncio.Task[None] | None = None
        self._probed_s = time.monotonic()
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
        """Serve replaces a replica that cannot make a token.

        A dead engine is found at every check; a real token is asked for less often, since with
        weights on a disk it costs a pass over all of them. It may take longer than a check, as
        long as the pass gets on.
        """
        if self._engine.failure is not None:
            raise EngineDeadError(str(self._engine.failure))
        if self._probe is None and time.monotonic() - self._probed_s >= TOKEN_PERIOD_S:
            self._probe = asyncio.create_task(self._engine.check_health())
        if self._probe is not None:
            done, _ = await asyncio.wait({self._probe}, timeout=PROBE_WAIT_S)
            if done:
                probe, self._probe = self._probe, None
                self._probed_s = time.monotonic()
                probe.result()

    async def stats(self) -> dict[str, Any]:
        """The engine's statistics, through a Serve handle."""
        return await self._engine.stats()

    async def _report(self) -> None:
        while self._engine.failure is None:
            self._metrics.engine_stats(await self._engine.stats())
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
        for task in (*self._tasks, *([self._probe] if self._probe else [])):
            task.cancel()
        await self._engine.close()
        self._loading.close()
