"""The error object of the OpenAI API, and how exceptions become one."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from giantserve.errors import GiantserveError, InvalidRequestError, QueueFullError

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


class ParameterError(InvalidRequestError):
    """One field of the request cannot be honoured.

    ``param`` names it, ``code`` is machine-readable.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class BodyTooLargeError(InvalidRequestError):
    """The request's body is larger than the server reads."""

    status_code = 413


def error_object(
    message: str, error_type: str, param: str | None = None, code: str | int | None = None
) -> dict[str, Any]:
    """The body of every error: one line of message, never a traceback."""
    return {
        "error": {
            "message": " ".join(message.split()),
            "type": error_type,
            "param": param,
            "code": code,
        }
    }


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, error object) of an exception.

    An unknown one tells the client nothing but its kind.
    """
    if isinstance(error, GiantserveError):
        param = getattr(error, "param", None)
        code = getattr(error, "code", None)
        return error.status_code, error_object(str(error), error.error_type, param, code)
    if isinstance(error, ValidationError):
        return 400, _validation_object(error)
    return 500, error_object(f"internal error ({type(error).__name__})", "server_error")


def error_response(error: Exception) -> JSONResponse:
    """The whole HTTP response for an exception, with Retry-After where waiting helps."""
    status, body = describe(error)
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif status == 503:
        headers["Retry-After"] = "1"
    return JSONResponse(body, status_code=status, headers=headers)


def error_event(error: Exception) -> bytes:
    """The server-sent event for an error that comes after the response has begun."""
    return b"data: " + json.dumps(describe(error)[1]).encode() + b"\n\n"


def _validation_object(error: ValidationError) -> dict[str, Any]:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    kind, given = first["type"], first.get("input")
    if kind == "json_invalid":
        return error_object(f"the body is not valid JSON: {first['msg']}", "invalid_request_error")
    if kind == "extra_forbidden":
        message = f"unknown field '{param}'; leave it out"
    elif kind == "missing":
        message = f"field '{param}' is required"
    else:
        shown = json.dumps(given, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        reason = first["msg"].removeprefix("Value error, ")
        message = f"field '{param}': {reason}, got {shown}" if param else reason
    return error_object(message, "invalid_request_error", param)
