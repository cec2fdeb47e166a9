"""A client that hangs up frees its request at once, through a real server and socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import uvicorn
from fake_engine import FakeEngine

from giantserve.api.app import create_app


@pytest.fixture
async def url(engine: FakeEngine) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(create_app(engine, api_key="k"), log_level="critical")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        await serving


@pytest.mark.parametrize(("stream", "stall_after"), [(True, 2), (True, 0), (False, 2)])
async def test_a_disconnect_aborts(
    url: str, engine: FakeEngine, stream: bool, stall_after: int
) -> None:
    engine.stall_after = stall_after
    body = {"model": "fake", "prompt": ["a", "b"], "stream": stream}

    async def ask() -> None:
        headers = {"Authorization": "Bearer k"}
        async with (
            httpx.AsyncClient(headers=headers, timeout=None) as http,
            http.stream("POST", f"{url}/completions", json=body) as response,
        ):
            await response.aread()

    asking = asyncio.create_task(ask())
    await engine.stalled.wait()
    assert len(engine.running) == 2
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(1.0):
        while engine.running:
            await asyncio.sleep(0.005)
    assert len(engine.aborted) == 2


async def test_the_first_token_does_not_wait_for_the_second(url: str, engine: FakeEngine) -> None:
    engine.stall_after = 1
    client = openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0)
    async with client, asyncio.timeout(10):
        stream = await client.completions.create(model="fake", prompt="x", stream=True)
        first = await anext(aiter(stream))
        assert first.choices[0].text == "a"
        assert engine.stalled.is_set() or engine.running
        await stream.close()


async def test_the_openai_client_works_unchanged(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["fake"]
        completion = await client.completions.create(
            model="fake", prompt="hey", max_tokens=2, logprobs=1, echo=True
        )
        assert completion.choices[0].text == "heyab"
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.tokens == ["h", "e", "y", "a", "b"]
        chat = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=3,
            logprobs=True,
            extra_body={"top_k": 4},
        )
        assert chat.choices[0].message.content == "abc"
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 3
        stream = await client.chat.completions.create(
            model="fake",
            messages=[chat.choices[0].message.to_dict()],  # type: ignore[list-item]
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "abc"
        assert chunks[-1].usage is not None
        with pytest.raises(openai.NotFoundError, match="'other' is not served"):
            await client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
            await client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": "hi"}],
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
    async with openai.AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_an_error_within_a_stream_reaches_the_openai_client(
    url: str, engine: FakeEngine
) -> None:
    engine.error, engine.fail_after = RuntimeError("boom"), 1
    async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
        stream = await client.completions.create(model="fake", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="internal error"):
            [chunk async for chunk in stream]


async def test_a_large_body_gets_its_answer_over_a_socket(url: str) -> None:
    body = b'{"model": "fake", "prompt": "' + b"x" * 10_000_000 + b'"}'
    async with httpx.AsyncClient(headers={"Authorization": "Bearer k"}) as http:
        response = await http.post(f"{url}/completions", content=body)
    assert response.status_code == 413
