"""The clients over the real app and the small engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "api"))

from fake_engine import FakeEngine

from giantserve.api.app import create_app
from giantserve.client import AsyncClient, Client, RetryPolicy
from giantserve.errors import (
    AuthenticationError,
    EngineDeadError,
    GiantserveError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
)

AT_ONCE = RetryPolicy(first_delay_s=0.0)


def client_of(engine: FakeEngine, **options: Any) -> AsyncClient:
    return AsyncClient(
        "http://test/v1/", transport=httpx.ASGITransport(create_app(engine)), **options
    )


async def test_complete_chat_and_models() -> None:
    async with client_of(FakeEngine()) as client:
        reply = await client.complete("hey", max_tokens=2, n=2)
        assert reply.texts == ("ab", "ab")
        assert (reply.finish_reason, reply.model) == ("length", "fake")
        assert (reply.usage.prompt_tokens, reply.usage.cached_tokens) == (3, 1)
        assert (await client.chat("hi", max_tokens=3)).text == "abc"
        assert await client.models() == ["fake"]
        await client.health()


async def test_streams() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        assert [t async for t in client.stream_complete([1, 2], max_tokens=3)] == ["a", "b", "c"]
        turns = [{"role": "user", "content": "hi"}]
        assert [t async for t in client.stream_chat(turns, max_tokens=2)] == ["a", "b"]
        engine.error, engine.fail_after = EngineDeadError("shard 0 died"), 1
        seen = []
        with pytest.raises(EngineDeadError, match="shard 0 died"):
            async for text in client.stream_complete("x"):
                seen.append(text)
        assert seen == ["a"]


async def test_batch_keeps_the_order_and_the_bound() -> None:
    engine = FakeEngine()
    most = 0

    prompts = ["x" * length for length in range(1, 21)]
    async with client_of(engine) as client:
        generate = engine.generate

        async def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal most
            async for delta in generate(*args, **kwargs):
                most = max(most, len(engine.running))
                yield delta

        engine.generate = counted  # type: ignore[method-assign,assignment]
        replies = await client.batch(prompts, concurrency=3, progress=True, max_tokens=2)
    assert [reply.usage.prompt_tokens for reply in replies] == list(range(1, 21))
    assert most == 3


async def test_batch_raises_the_first_failure() -> None:
    async with client_of(FakeEngine(max_model_len=8)) as client:
        with pytest.raises(InvalidRequestError, match="99 tokens"):
            await client.batch(["a", "x" * 99, "b"], concurrency=2, max_tokens=1)
        with pytest.raises(ValueError, match="concurrency 0"):
            await client.batch(["a"], concurrency=0)


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (400, {}, InvalidRequestError),
        (413, {}, InvalidRequestError),
        (401, {}, AuthenticationError),
        (404, {}, ModelNotFoundError),
        (429, {"retry-after": "3"}, QueueFullError),
        (503, {}, EngineDeadError),
        (500, {}, GiantserveError),
    ],
)
def test_errors_come_back_typed(
    status: int, headers: dict[str, str], expected: type[GiantserveError]
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = {"error": {"message": "why", "type": "t", "param": None, "code": None}}
        return httpx.Response(status, json=body, headers=headers)

    retry = RetryPolicy(max_retries=0)
    with Client(model="m", retry=retry, transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(expected, match="why") as caught:
            client.complete("x")
        assert type(caught.value) is expected
        if isinstance(caught.value, QueueFullError):
            assert caught.value.retry_after_s == 3.0
        with pytest.raises(expected, match="why"):
            list(client.stream_chat("x"))


def test_an_error_that_is_not_ours_is_quoted() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="bad gateway"))
    with (
        Client(model="m", transport=transport) as client,
        pytest.raises(GiantserveError, match="bad"),
    ):
        client.complete("x")


@pytest.mark.parametrize("stream", [False, True])
def test_retries_until_it_works(stream: bool) -> None:
    failures = [
        httpx.Response(429, headers={"retry-after": "0"}, json={}),
        httpx.Response(503, json={}),
        httpx.ConnectError("refused"),
    ]
    attempts = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal attempts
        attempts += 1
        if not failures:
            if stream:
                return httpx.Response(
                    200, text='data: {"choices": [{"index": 0, "text": "y"}]}\n\n'
                )
            usage = {"prompt_tokens": 1, "completion_tokens": 1}
            choice = {"index": 0, "text": "y", "finish_reason": "stop"}
            return httpx.Response(200, json={"model": "m", "usage": usage, "choices": [choice]})
        failure = failures.pop(0)
        if isinstance(failure, Exception):
            raise failure
        return failure

    with Client(model="m", retry=AT_ONCE, transport=httpx.MockTransport(answer)) as client:
        text = "".join(client.stream_complete("x")) if stream else client.complete("x").text
    assert text == "y"
    assert attempts == 4


def test_delays_grow_with_jitter_and_honour_retry_after() -> None:
    policy = RetryPolicy(max_retries=4, first_delay_s=1.0, max_delay_s=3.0, draw=lambda: 0.5)
    dead = EngineDeadError("x")
    assert [policy.delay_s(dead, attempt) for attempt in range(5)] == [0.5, 1.0, 1.5, 1.5, None]
    assert policy.delay_s(QueueFullError("x", 7.0), 0) == 7.5
    assert policy.delay_s(InvalidRequestError("x"), 0) is None
    assert policy.delay_s(httpx.ReadTimeout("x"), 0) is None


def test_blocking_batch_keeps_the_order() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        prompt = json.loads(request.content)["prompt"]
        choice = {"index": 0, "text": prompt.upper(), "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return httpx.Response(200, json={"model": "m", "usage": usage, "choices": [choice]})

    with Client(model="m", transport=httpx.MockTransport(answer)) as client:
        replies = client.batch([f"p{i}" for i in range(30)], concurrency=4, progress=True)
    assert [reply.text for reply in replies] == [f"P{i}" for i in range(30)]


@pytest.mark.parametrize("module", ["giantserve", "giantserve.client", "giantserve.cli"])
def test_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
