"""When to try again, and how long to wait before."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from giantserve.errors import EngineDeadError, GiantserveError, QueueFullError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter over 429, 503 and connection errors.

    ``max_retries`` come after the first attempt. A server's Retry-After is the least that is
    waited.
    """

    max_retries: int = 4
    first_delay_s: float = 0.25
    max_delay_s: float = 8.0
    draw: Callable[[], float] = random.random

    def delay_s(self, error: Exception, attempt: int) -> float | None:
        """Seconds to wait before attempt ``attempt + 1`` (the first is 0); None: give up."""
        if attempt >= self.max_retries or not is_retryable(error):
            return None
        ceiling = min(self.max_delay_s, self.first_delay_s * float(2**attempt))
        asked = error.retry_after_s if isinstance(error, QueueFullError) else 0.0
        return asked + ceiling * self.draw()


def is_retryable(error: Exception) -> bool:
    """A full queue, a dead engine, or a connection that failed before an answer began."""
    if isinstance(error, GiantserveError):
        return isinstance(error, (QueueFullError, EngineDeadError))
    return isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError))
