"""Every refusal has the right status and the OpenAI error object."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fake_engine import FakeEngine

from giantserve.api.app import create_app
from giantserve.errors import EngineDeadError, QueueFullError

PATH = "/v1/completions"


def check(response: httpx.Response, status: int, says: str) -> dict[str, object]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, object] = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert says in str(error["message"])
    assert "Traceback" not in response.text
    assert "\n" not in str(error["message"])
    return error


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tempreture": 1}, "tempreture", "unknown field 'tempreture'"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0, got -1"),
        ({"max_tokens": 0}, None, "at least 1 unless 'echo'"),
        ({"max_tokens": True}, "max_tokens", "valid integer, got true"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": []}, "prompt", "a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt", "a list of token ids"),
        ({"prompt": [True]}, "prompt", "a list of token ids"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"stop": [""]}, "stop", "non-empty string"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"best_of": 2}, None, "'best_of' is 2"),
        ({"suffix": "end"}, None, "'suffix' is not supported"),
        ({"stream_options": {"include_usage": True}}, None, "'stream_options' needs"),
        ({"stream": True, "prompt_logprobs": 1}, None, "not available with 'stream'"),
        ({"prompt": "x" * 64}, None, "the prompt has 64 tokens"),
        ({"max_tokens": 64}, "max_tokens", "ask for at most 62"),
    ],
)
async def test_bad_fields(
    http: httpx.AsyncClient, fields: dict[str, object], param: str | None, says: str
) -> None:
    response = await http.post(PATH, json={"model": "fake", "prompt": "hi", **fields})
    error = check(response, 400, says)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


async def test_context_overflow_has_the_code_of_openai(http: httpx.AsyncClient) -> None:
    response = await http.post(PATH, json={"model": "fake", "prompt": "x" * 99})
    assert check(response, 400, "shorten")["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": "\xff"}', b"[]", b"3", b'{"model":"fake","prompt":NaN}']
)
async def test_bodies_that_are_no_request(http: httpx.AsyncClient, body: bytes) -> None:
    check(await http.post(PATH, content=body), 400, "")


async def test_large_bodies_are_refused_by_length_and_by_count(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = b'{"model": "fake", "prompt": "' + b"x" * 10_000_000 + b'"}'

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    check(await http.post(PATH, content=body), 413, "over the limit of 100000 bytes")
    check(await http.post(PATH, content=chunks()), 413, "over the limit of 100000 bytes")
    assert engine.calls == []


@pytest.mark.parametrize("length", ["abc", "-1", "+1", "1_0", "²".encode(), "9" * 5000])
async def test_a_length_that_is_no_number(http: httpx.AsyncClient, length: str | bytes) -> None:
    response = await http.post(PATH, content=b"{}", headers={"Content-Length": length})
    check(response, 400, "the Content-Length header is not a number")


async def test_paths_methods_and_models(http: httpx.AsyncClient) -> None:
    check(await http.get("/nowhere"), 404, "no such path: GET /nowhere")
    response = await http.get(PATH)
    check(response, 405, "method not allowed")
    assert response.headers["allow"] == "POST"
    unknown = await http.post(PATH, json={"model": "gpt", "prompt": "x"})
    check(unknown, 404, "model 'gpt' is not served here; this is 'fake'")
    check(await http.get("/v1/models/gpt"), 404, "gpt")
    assert (await http.get("/v1/models/fake")).json()["max_model_len"] == 64
    assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["fake"]


async def test_api_key(engine: FakeEngine) -> None:
    transport = httpx.ASGITransport(create_app(engine, api_key="secret"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        check(await http.get("/v1/models"), 401, "API key")
        for wrong in ("Bearer secre", "Bearer secret2", "secret", "Bearer "):
            headers = {"Authorization": wrong}
            check(await http.get("/v1/models", headers=headers), 401, "API key")
        right = {"Authorization": "Bearer secret"}
        assert (await http.get("/v1/models", headers=right)).status_code == 200
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_errors_before_the_first_token(
    http: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    body = {"model": "fake", "prompt": "hi", "stream": stream}
    engine.error = QueueFullError("the queue holds 8 requests", retry_after_s=2.5)
    response = await http.post(PATH, json=body)
    check(response, 429, "the queue holds 8 requests")
    assert response.headers["retry-after"] == "3"
    engine.error = EngineDeadError("shard 1 died")
    check(await http.post(PATH, json=body), 503, "shard 1 died")
    check(await http.get("/health"), 503, "shard 1 died")
    engine.error = RuntimeError("secret of the house")
    response = await http.post(PATH, json=body)
    check(response, 500, "internal error (RuntimeError)")
    assert "secret" not in response.text
    assert engine.running == set()


async def test_an_error_after_the_stream_began_is_an_event(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.error, engine.fail_after = EngineDeadError("shard 1 died"), 2
    response = await http.post(PATH, json={"model": "fake", "prompt": "hi", "stream": True})
    assert response.status_code == 200
    events = response.text.strip().split("\n\n")
    assert len(events) == 3
    assert events[-1] == (
        'data: {"error": {"message": "shard 1 died", "type": "service_unavailable", '
        '"param": null, "code": null}}'
    )
    assert engine.running == set()


async def test_a_model_without_a_tokenizer_takes_token_ids(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.tokenizer = None
    body = {"model": "fake", "max_tokens": 1}
    check(await http.post(PATH, json={**body, "prompt": "hi"}), 400, "send the prompt as token ids")
    response = await http.post(PATH, json={**body, "prompt": [1, 2], "logprobs": 0})
    assert response.json()["choices"][0]["logprobs"]["tokens"] == ["token_id:97"]
