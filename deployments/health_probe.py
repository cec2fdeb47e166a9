"""Whether an engine still makes tokens, asked of it now and then."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from giantserve.errors import EngineDeadError

if TYPE_CHECKING:
    from giantserve.async_engine import AsyncEngine

TOKEN_PERIOD_S = 30.0
PROBE_WAIT_S = 1.0


class HealthProbe:
    """Answers Serve's health checks.

    A dead engine is found at every check; a real token is asked for less often, since with weights
    on a disk it costs a pass over all of them. It may take longer than a check, as long as the pass
    gets on. Serve replaces a replica after several failed checks in a row: once a token has failed
    all do, until another, asked for at once, succeeds.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._token: asyncio.Task[None] | None = None
        self._asked_s = time.monotonic()
        self._failed: str | None = None

    async def check(self) -> None:
        """Raises EngineDeadError where the engine is dead or the last token failed; waits for one
        under way for at most `PROBE_WAIT_S`."""
        if self._engine.failure is not None:
            raise EngineDeadError(str(self._engine.failure))
        is_due = time.monotonic() - self._asked_s >= TOKEN_PERIOD_S
        if self._token is None and (is_due or self._failed is not None):
            self._token = asyncio.create_task(self._engine.check_health())
        if self._token is not None:
            done, _ = await asyncio.wait({self._token}, timeout=PROBE_WAIT_S)
            if done:
                error = self._token.exception()
                self._failed = None if error is None else str(error)
                self._token = None
                self._asked_s = time.monotonic()
        if self._failed is not None:
            raise EngineDeadError(self._failed)

    def close(self) -> None:
        """Wait for no token any more."""
        if self._token is not None:
            self._token.cancel()
