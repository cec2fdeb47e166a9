"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from giantserve.client import wire
from giantserve.client.error_mapping import error_from
from giantserve.client.progress import batch_progress
from giantserve.client.reply import Reply
from giantserve.client.retry import RetryPolicy

T = TypeVar("T")


class Client:
    """A client of one server; use it in a ``with`` or call `close`. Threads may share it.

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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._model = model
        self._retry = retry or RetryPolicy()
        self._http = httpx.Client(
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            headers=wire.headers(api_key),
            timeout=httpx.Timeout(timeout_s, connect=wire.CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )

    def complete(self, prompt: wire.Prompt, **options: Any) -> Reply:
        """Complete a text or a list of token ids."""
        body = wire.completion_body(self._served(), prompt, options)
        return Reply.from_body(self._post(wire.COMPLETIONS, body))

    def chat(self, messages: wire.Messages, **options: Any) -> Reply:
        """Answer a conversation; a plain string is one user's turn."""
        body = wire.chat_body(self._served(), messages, options)
        return Reply.from_body(self._post(wire.CHAT, body))

    def stream_complete(self, prompt: wire.Prompt, **options: Any) -> Generator[str, None, None]:
        """Text of the first choice as it is made. Closing the generator aborts the request."""
        body = wire.completion_body(self._served(), prompt, options)
        with closing(self.stream_chunks(wire.COMPLETIONS, body)) as chunks:
            yield from filter(None, map(wire.text_of, chunks))

    def stream_chat(self, messages: wire.Messages, **options: Any) -> Generator[str, None, None]:
        """Text of the first choice as it is made. Closing the generator aborts the request."""
        body = wire.chat_body(self._served(), messages, options)
        with closing(self.stream_chunks(wire.CHAT, body)) as chunks:
            yield from filter(None, map(wire.text_of, chunks))

    def stream_chunks(
        self, path: str, body: dict[str, Any]
    ) -> Generator[dict[str, Any], None, None]:
        """The raw chunks of a streamed request.

        Only what fails before the first one is tried again.
        """

        def begin() -> httpx.Response:
            request = self._http.build_request("POST", path, json={**body, "stream": True})
            response = self._http.send(request, stream=True)
            if response.is_success:
                return response
            content = response.read()
            response.close()
            raise error_from(response.status_code, response.headers, content)

        response = self._retrying(begin)
        try:
            for line in response.iter_lines():
                chunk = wire.read_event(line)
                if chunk is not None:
                    yield chunk
        finally:
            response.close()

    def batch(
        self,
        prompts: Iterable[wire.Prompt],
        *,
        concurrency: int = 32,
        progress: bool = False,
        **options: Any,
    ) -> list[Reply]:
        """Complete many prompts, at most ``concurrency`` at a time; replies in the prompts' order.

        The first prompt that fails for good stops the rest from starting and raises.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency {concurrency} must be at least 1")
        self._served()
        all_prompts = list(prompts)
        failed = threading.Event()
        lock = threading.Lock()

        with batch_progress(len(all_prompts), progress) as advance:

            def work(prompt: wire.Prompt) -> Reply | None:
                if failed.is_set():
                    return None
                try:
                    reply = self.complete(prompt, **options)
                except BaseException:
                    failed.set()
                    raise
                with lock:
                    advance(reply.usage.completion_tokens)
                return reply

            with ThreadPoolExecutor(max_workers=concurrency) as pool:
                futures = [pool.submit(work, prompt) for prompt in all_prompts]
            replies = [future.result() for future in futures]
        return [reply for reply in replies if reply is not None]

    def models(self) -> list[str]:
        """The names of the models that the server serves."""
        return [card["id"] for card in self._get("/v1/models")["data"]]

    def stats(self) -> dict[str, Any]:
        """The engine's counters: queues, KV blocks, tokens, bytes moved by tier."""
        return self._get("/stats")

    def health(self) -> None:
        """Return when the server made a real token; raise EngineDeadError when it cannot."""
        response = self._http.get("/health")
        if not response.is_success:
            raise error_from(response.status_code, response.headers, response.content)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _served(self) -> str:
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._json(lambda: self._http.post(path, json=body))

    def _get(self, path: str) -> dict[str, Any]:
        return self._json(lambda: self._http.get(path))

    def _json(self, send: Callable[[], httpx.Response]) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            response = send()
            if not response.is_success:
                raise error_from(response.status_code, response.headers, response.content)
            body: dict[str, Any] = response.json()
            return body

        return self._retrying(attempt)

    def _retrying(self, attempt: Callable[[], T]) -> T:
        tried = 0
        while True:
            try:
                return attempt()
            except Exception as error:
                delay_s = self._retry.delay_s(error, tried)
                if delay_s is None:
                    raise
            tried += 1
            time.sleep(delay_s)
