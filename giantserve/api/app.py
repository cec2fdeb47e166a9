"""The FastAPI application over an engine."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from giantserve.api.answer import Answer, Envelope
from giantserve.api.auth import BearerAuth
from giantserve.api.body import read_body
from giantserve.api.chat import ChatAnswer
from giantserve.api.completions import CompletionAnswer
from giantserve.api.disconnect import ClientGoneError, unless_disconnected
from giantserve.api.engine import ServingEngine
from giantserve.api.errors import error_object, error_response
from giantserve.api.generation import Generation
from giantserve.api.metrics import Metrics, NoMetrics
from giantserve.api.no_tokenizer import codec_of
from giantserve.api.prompts import chat_prompt, completion_prompts, remaining_tokens
from giantserve.api.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields
from giantserve.api.sse import CLIENT_GONE_STATUS, DONE, EventStream
from giantserve.errors import GiantserveError, ModelNotFoundError
from giantserve.options import DEFAULT_MAX_BODY_BYTES

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16

Work = Callable[[], Awaitable[Response]]


def create_app(
    engine: ServingEngine | Callable[[], ServingEngine],
    *,
    api_key: str | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The OpenAI-compatible app. ``engine`` may be a getter, asked once a request.

    With ``api_key`` every path but /health needs it. The app neither starts nor closes the engine.
    """
    app = FastAPI(title="giantserve", docs_url=None, redoc_url=None, openapi_url=None)
    routes = Routes(engine, max_body_bytes, metrics or NoMetrics())
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/stats", routes.stats, methods=["GET"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"])
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"])
    app.add_exception_handler(HTTPException, _http_exception)
    if api_key is not None:
        app.add_middleware(BearerAuth, api_key=api_key)
    return app


class Routes:
    """The endpoints. Bodies are parsed here, not by FastAPI: bytes to model in one strict step."""

    def __init__(
        self,
        engine: ServingEngine | Callable[[], ServingEngine],
        max_body_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._engine_or_getter = engine
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics
        self._created = int(time.time())

    @property
    def _engine(self) -> ServingEngine:
        held = self._engine_or_getter
        return held() if callable(held) else held

    async def health(self, request: Request) -> Response:
        """200 when a real token came back."""

        async def work() -> Response:
            await self._engine.check_health()
            return JSONResponse({"status": "ok"})

        return await self._answer(request, "/health", work)

    async def stats(self, request: Request) -> Response:
        """The engine's counters: queues, KV blocks, tokens, bytes moved by tier."""

        async def work() -> Response:
            return JSONResponse(await self._engine.stats())

        return await self._answer(request, "/stats", work)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, name: str) -> Response:
        try:
            self._check_model(name)
        except ModelNotFoundError as error:
            return error_response(error)
        return JSONResponse(self._model_card())

    async def completions(self, request: Request) -> Response:
        started_s = time.perf_counter()

        async def work() -> Response:
            body = await read_body(request, self._max_body_bytes)
            fields = CompletionRequest.model_validate_json(body)
            self._check_model(fields.model)
            return await self._complete(request, fields, started_s)

        return await self._answer(request, "/v1/completions", work)

    async def chat_completions(self, request: Request) -> Response:
        started_s = time.perf_counter()

        async def work() -> Response:
            body = await read_body(request, self._max_body_bytes)
            fields = ChatCompletionRequest.model_validate_json(body)
            self._check_model(fields.model)
            return await self._chat(request, fields, started_s)

        return await self._answer(request, "/v1/chat/completions", work)

    async def _complete(
        self, request: Request, fields: CompletionRequest, started_s: float
    ) -> Response:
        engine = self._engine
        prompts = await completion_prompts(engine, fields.prompt, needs_text=fields.echo)
        score_only = fields.max_tokens == 0
        asked = 1 if score_only else (fields.max_tokens or DEFAULT_COMPLETION_TOKENS)
        params = []
        for prompt in prompts:
            room = remaining_tokens(engine, prompt, asked if fields.max_tokens else None)
            params.append(fields.sampling(min(asked, room)))
        envelope = self._envelope("cmpl", "text_completion", "text_completion")
        generation = Generation(
            engine,
            prompts,
            params,
            request_id=envelope.request_id,
            tenant=fields.user,
            priority=fields.priority,
            metrics=self._metrics,
            score_only=score_only,
        )
        answer = CompletionAnswer(fields, prompts, codec_of(engine), envelope)
        return await self._respond(request, fields, generation, answer, started_s)

    async def _chat(
        self, request: Request, fields: ChatCompletionRequest, started_s: float
    ) -> Response:
        engine = self._engine
        prompt = await chat_prompt(engine, fields.messages)
        room = remaining_tokens(engine, prompt, fields.token_limit)
        envelope = self._envelope("chatcmpl", "chat.completion", "chat.completion.chunk")
        generation = Generation(
            engine,
            [prompt],
            [fields.sampling(fields.token_limit or room)],
            request_id=envelope.request_id,
            tenant=fields.user,
            priority=fields.priority,
            metrics=self._metrics,
        )
        answer = ChatAnswer(fields, codec_of(engine), envelope)
        return await self._respond(request, fields, generation, answer, started_s)

    async def _respond(
        self,
        request: Request,
        fields: SamplingFields,
        generation: Generation,
        answer: Answer,
        started_s: float,
    ) -> Response:
        if not fields.stream:
            collected = await unless_disconnected(request.receive, generation.collect())
            return JSONResponse(answer.whole(collected, generation.usage))
        with_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        events = _events(generation, answer, with_usage)
        # The first event decides the status: a refused request gets its own, not a broken stream.
        try:
            first = await unless_disconnected(request.receive, anext(events))
        except BaseException:
            await events.aclose()
            raise
        route = request.url.path

        def finished(status: int) -> None:
            self._metrics.request_finished(route, status, time.perf_counter() - started_s)

        return EventStream(_prepend(first, events), finished)

    async def _answer(self, request: Request, route: str, work: Work) -> Response:
        """Run ``work``; whatever it raises becomes an error object.

        Streams report their own end.
        """
        started_s = time.perf_counter()
        try:
            response = await work()
        except (GiantserveError, ValidationError) as error:
            response = error_response(error)
        except (ClientGoneError, ClientDisconnect):
            response = Response(status_code=CLIENT_GONE_STATUS)
        except Exception as error:
            logger.exception("%s failed", route)
            response = error_response(error)
        if not isinstance(response, EventStream):
            elapsed_s = time.perf_counter() - started_s
            self._metrics.request_finished(route, response.status_code, elapsed_s)
        return response

    def _check_model(self, name: str) -> None:
        served = self._engine.model_name
        if name != served:
            raise ModelNotFoundError(f"model '{name}' is not served here; this is '{served}'")

    def _model_card(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "id": engine.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "giantserve",
            "max_model_len": engine.max_model_len,
        }

    def _envelope(self, prefix: str, kind: str, chunk_kind: str) -> Envelope:
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        return Envelope(kind, chunk_kind, request_id, int(time.time()), self._engine.model_name)


async def _events(
    generation: Generation, answer: Answer, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    async with aclosing(generation.stream()) as deltas:
        async for delta in deltas:
            yield answer.chunk(delta)
    if with_usage:
        yield answer.usage_chunk(generation.usage)
    yield DONE


async def _prepend(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (unknown path, wrong method) in the shape of every other error."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    reason = {404: "no such path", 405: "method not allowed"}.get(error.status_code, error.detail)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = error_object(f"{reason}: {where}", kind)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
