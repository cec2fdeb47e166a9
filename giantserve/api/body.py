"""Reading a request's body under a limit."""

from __future__ import annotations

import re

from fastapi import Request

from giantserve.api.errors import BodyTooLargeError, ParameterError

DRAIN_FACTOR = 16


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most ``limit`` bytes.

    A larger one is read on and thrown away, up to `DRAIN_FACTOR` times the limit, since a client
    whose sending is cut off never sees the answer. Raises BodyTooLargeError, or ParameterError for
    a Content-Length that is no number.
    """
    declared = request.headers.get("content-length")
    if declared is not None and not re.fullmatch("[0-9]{1,20}", declared):
        raise ParameterError("the Content-Length header is not a number")
    too_large = declared is not None and int(declared) > limit
    body = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        too_large = too_large or received > limit
        if too_large:
            body.clear()
            if received > limit * DRAIN_FACTOR:
                break
        else:
            body += chunk
    if too_large:
        raise BodyTooLargeError(f"the body is over the limit of {limit} bytes; send less")
    return bytes(body)
