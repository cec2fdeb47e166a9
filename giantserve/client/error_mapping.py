"""From an HTTP error back to the exception that the server raised."""

from __future__ import annotations

import json
from typing import Any

import httpx

from giantserve.errors import (
    AuthenticationError,
    EngineDeadError,
    GiantserveError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
)

_BY_STATUS: dict[int, type[GiantserveError]] = {
    401: AuthenticationError,
    404: ModelNotFoundError,
    503: EngineDeadError,
}
_BY_TYPE: dict[str, type[GiantserveError]] = {
    error.error_type: error
    for error in (
        InvalidRequestError,
        AuthenticationError,
        ModelNotFoundError,
        QueueFullError,
        EngineDeadError,
    )
}


def error_from(status: int, headers: httpx.Headers, content: bytes) -> GiantserveError:
    """The typed error of a response whose status is not 2xx.

    A body that is not ours is quoted, cut.
    """
    message = _message(content) or f"the server answered {status}"
    if status == 429:
        return QueueFullError(message, _retry_after_s(headers))
    if status in _BY_STATUS:
        return _BY_STATUS[status](message)
    return InvalidRequestError(message) if 400 <= status < 500 else GiantserveError(message)


def error_in_stream(error: dict[str, Any]) -> GiantserveError:
    """The typed error of an error object that came as an event."""
    kind = _BY_TYPE.get(str(error.get("type")), GiantserveError)
    return kind(str(error.get("message")))


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace").strip()


def _retry_after_s(headers: httpx.Headers) -> float:
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return 1.0
