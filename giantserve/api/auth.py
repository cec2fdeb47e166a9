"""The API key, checked before anything of a request is read."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from giantserve.api.errors import error_response
from giantserve.errors import AuthenticationError

OPEN_PATHS = frozenset({"/health"})


class BearerAuth:
    """ASGI middleware: ``Authorization: Bearer KEY`` or 401. Health checks need no key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allows(scope):
            await self._app(scope, receive, send)
            return
        error = AuthenticationError("missing or wrong API key; send 'Authorization: Bearer KEY'")
        response = error_response(error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)
