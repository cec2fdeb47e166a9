"""Server-sent events: each chunk is sent the moment it is there."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from giantserve.api.disconnect import ClientGoneError, unless_disconnected
from giantserve.api.errors import error_event
from giantserve.errors import GiantserveError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
CLIENT_GONE_STATUS = 499


class EventStream(Response):
    """An ASGI response over ``events``, which it owns and closes.

    An error after the first byte becomes an event with the error object; the stream then ends with
    no [DONE]. ``finished`` is called once with the status that describes how it went.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], finished: Callable[[int], None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._finished = finished
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    def init_headers(self, headers: Any = None) -> None:
        """No Content-Length: the length is not known."""
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            *((k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = CLIENT_GONE_STATUS
        try:
            status = await unless_disconnected(receive, self._send_all(send))
        except (ClientGoneError, OSError):
            logger.debug("the client left before its stream ended")
        finally:
            await self._events.aclose()
            self._finished(status)

    async def _send_all(self, send: Send) -> int:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        status = self.status_code
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except GiantserveError as error:
                status = error.status_code
                await self._send_error(send, error)
            except OSError:
                raise
            except Exception as error:
                logger.exception("a stream failed")
                status = 500
                await self._send_error(send, error)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return status

    @staticmethod
    async def _send_error(send: Send, error: Exception) -> None:
        await send({"type": "http.response.body", "body": error_event(error), "more_body": True})
