"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from giantserve.client import wire
from giantserve.client.error_mapping import error_from
from giantserve.client.progress import batch_progress
from giantserve.client.reply import Reply
from giantserve.client.retry import RetryPolicy

T = TypeVar("T")


class AsyncClient:
    """A client of one server; use it as ``async with`` or call `aclose`.

    ``options`` of the calls are the fields of the HTTP API (``max_tokens``, ``temperature``,
    ``seed``, ...). ``model`` None asks the server once which one it serves. Errors are those of
    `giantserve.errors`; failed connections and timeouts are httpx's. ``transport`` replaces the
    network in tests.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = wire.DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._model = model
        self._retry = retry or RetryPolicy()
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            headers=wire.headers(api_key),
            timeout=httpx.Timeout(timeout_s, connect=wire.CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )

    async def complete(self, prompt: wire.Prompt, **options: Any) -> Reply:
        """Complete a text or a list of token ids."""
        body = wire.completion_body(await self._served(), prompt, options)
        return Reply.from_body(await self._post(wire.COMPLETIONS, body))

    async def chat(self, messages: wire.Messages, **options: Any) -> Reply:
        """Answer a conversation; a plain string is one user's turn."""
        body = wire.chat_body(await self._served(), messages, options)
        return Reply.from_body(await self._post(wire.CHAT, body))

    async def stream_complete(
        self, prompt: wire.Prompt, **options: Any
    ) -> AsyncGenerator[str, None]:
        """Text of the first choice as it is made.

        Leaving the loop and closing it aborts the request.
        """
        body = wire.completion_body(await self._served(), prompt, options)
        async with aclosing(self.stream_chunks(wire.COMPLETIONS, body)) as chunks:
            async for chunk in chunks:
                if text := wire.text_of(chunk):
                    yield text

    async def stream_chat(
        self, messages: wire.Messages, **options: Any
    ) -> AsyncGenerator[str, None]:
        """Text of the first choice as it is made.

        Leaving the loop and closing it aborts the request.
        """
        body = wire.chat_body(await self._served(), messages, options)
        async with aclosing(self.stream_chunks(wire.CHAT, body)) as chunks:
            async for chunk in chunks:
                if text := wire.text_of(chunk):
                    yield text

    async def stream_chunks(
        self, path: str, body: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The raw chunks of a streamed request.

        Only what fails before the first one is tried again.
        """

        async def begin() -> httpx.Response:
            request = self._http.build_request("POST", path, json={**body, "stream": True})
            response = await self._http.send(request, stream=True)
            if response.is_success:
                return response
            content = await response.aread()
            await response.aclose()
            raise error_from(response.status_code, response.headers, content)

        response = await self._retrying(begin)
        try:
            async for line in response.aiter_lines():
                chunk = wire.read_event(line)
                if chunk is not None:
                    yield chunk
        finally:
            await response.aclose()

    async def batch(
        self,
        prompts: Iterable[wire.Prompt],
        *,
        concurrency: int = 32,
        progress: bool = False,
        **options: Any,
    ) -> list[Reply]:
        """Complete many prompts, at most ``concurrency`` at a time; replies in the prompts' order.

        The first prompt that fails for good cancels the rest and raises. ``prompts`` is read
        lazily.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency {concurrency} must be at least 1")
        await self._served()
        replies: dict[int, Reply] = {}
        waiting = enumerate(prompts)
        total = len(prompts) if isinstance(prompts, (list, tuple)) else None

        with batch_progress(total, progress) as advance:

            async def work() -> None:
                for position, prompt in waiting:
                    replies[position] = await self.complete(prompt, **options)
                    advance(replies[position].usage.completion_tokens)

            workers = min(concurrency, total) if total is not None else concurrency
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(work())
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
        return [replies[position] for position in range(len(replies))]

    async def models(self) -> list[str]:
        """The names of the models that the server serves."""
        return [card["id"] for card in (await self._get("/v1/models"))["data"]]

    async def stats(self) -> dict[str, Any]:
        """The engine's counters: queues, KV blocks, tokens, bytes moved by tier."""
        return await self._get("/stats")

    async def health(self) -> None:
        """Return when the server made a real token; raise EngineDeadError when it cannot."""
        response = await self._http.get("/health")
        if not response.is_success:
            raise error_from(response.status_code, response.headers, response.content)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _served(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._json(lambda: self._http.post(path, json=body))

    async def _get(self, path: str) -> dict[str, Any]:
        return await self._json(lambda: self._http.get(path))

    async def _json(self, send: Callable[[], Awaitable[httpx.Response]]) -> dict[str, Any]:
        async def attempt() -> dict[str, Any]:
            response = await send()
            if not response.is_success:
                raise error_from(response.status_code, response.headers, response.content)
            body: dict[str, Any] = response.json()
            return body

        return await self._retrying(attempt)

    async def _retrying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        tried = 0
        while True:
            try:
                return await attempt()
            except Exception as error:
                delay_s = self._retry.delay_s(error, tried)
                if delay_s is None:
                    raise
            tried += 1
            await asyncio.sleep(delay_s)
