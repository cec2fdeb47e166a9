"""Whether an engine still makes tokens, asked of it now and then."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from giantserve.errors import EngineDeadError

if TYPE_CHECKING:
    from giantserve.async_engine import AsyncEngine

TOKEN_PERIOD_S = 30.0

logger = logging.getLogger("ray.serve")


class HealthProbe:
    """Answers Serve's health checks, without waiting.

    An engine that is dead or stalled is found at every check, and Serve replaces a replica after
    several that fail in a row. An idle engine cannot stall: it is asked for a token now and then,
    not at every check, since with weights on a disk that costs a pass over all of them.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._token: asyncio.Task[None] | None = None
        self._asked_s = time.monotonic()

    async def check(self) -> None:
        """Raises EngineDeadError where the engine is dead or passes do not get on."""
        if self._engine.failure is not None:
            raise EngineDeadError(str(self._engine.failure))
        if self._token is None and time.monotonic() - self._asked_s >= TOKEN_PERIOD_S:
            self._token = asyncio.create_task(self._engine.check_health())
        elif self._token is not None and self._token.done():
            if (error := self._token.exception()) is not None:
                logger.warning("no token for a health check: %s", error)
            self._token = None
            self._asked_s = time.monotonic()
        self._engine.check_stall()

    def close(self) -> None:
        """Wait for no token any more."""
        if self._token is not None:
            self._token.cancel()
