"""/v1/chat/completions, whole and streamed."""

from __future__ import annotations

import json

import httpx
import pytest
from fake_engine import CharacterTokenizer, FakeEngine

HELLO = [{"role": "user", "content": "hi"}]


async def test_whole_answer(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await http.post(
        "/v1/chat/completions", json={"model": "fake", "messages": HELLO, "max_tokens": 2}
    )
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ab", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert CharacterTokenizer().decode(engine.calls[0]["ids"]) == "<user>hi<assistant>"


async def test_text_parts_names_and_returned_answers(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
    ]
    body = {"model": "fake", "messages": messages, "max_completion_tokens": 1}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    rendered = CharacterTokenizer().decode(engine.calls[0]["ids"])
    assert rendered == "<system>s<user>ab<assistant>c<assistant>"


async def test_without_a_limit_the_context_is_the_limit(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await http.post("/v1/chat/completions", json={"model": "fake", "messages": HELLO})
    assert engine.calls[0]["params"].max_tokens == 64 - len("<user>hi<assistant>")


async def test_logprobs(http: httpx.AsyncClient) -> None:
    body = {"model": "fake", "messages": HELLO, "max_tokens": 1}
    body |= {"logprobs": True, "top_logprobs": 2}
    response = await http.post("/v1/chat/completions", json=body)
    a = {"token": "a", "logprob": -0.5, "bytes": [97]}
    z = {"token": "z", "logprob": -9999.0, "bytes": [122]}
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs == {"content": [{**a, "top_logprobs": [a, z]}], "refusal": None}


async def test_stream_gives_the_role_once(http: httpx.AsyncClient) -> None:
    body = {"model": "fake", "messages": HELLO, "max_tokens": 2, "stream": True, "n": 2}
    response = await http.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "a"},
        {"content": "b"},
        {"content": "b"},
    ]
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 0, 1]
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert "usage" not in chunks[0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{"type": "function"}]}, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"functions": [{}]}, "'functions' is not supported"),
        ({"top_logprobs": 2}, "'top_logprobs' needs 'logprobs': true"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "differ"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "'messages.0.content' is required"),
        ({"messages": [{"role": "user", "content": 3}]}, "a string or a list of text parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts of type 'image_url' are not supported",
        ),
    ],
)
async def test_refusals(http: httpx.AsyncClient, fields: dict[str, object], says: str) -> None:
    body = {"model": "fake", "messages": HELLO, **fields}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


async def test_what_asks_for_nothing_is_accepted(http: httpx.AsyncClient) -> None:
    body = {"model": "fake", "messages": HELLO, "max_tokens": 1}
    body |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
