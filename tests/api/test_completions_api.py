"""/v1/completions, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
from fake_engine import FakeEngine


async def post(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/completions", json={"model": "fake", **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def stream(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "fake", "stream": True, **fields}
    response = await http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def test_whole_answer(http: httpx.AsyncClient) -> None:
    body = await post(http, prompt="hey", max_tokens=3)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "text": "abc",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_every_kind_of_prompt(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for prompt, expected in (
        ("hi", [[104, 105]]),
        (["hi", "u"], [[104, 105], [117]]),
        ([104, 105], [[104, 105]]),
        ([[104], [105]], [[104], [105]]),
    ):
        engine.calls.clear()
        body = await post(http, prompt=prompt, max_tokens=1)
        assert [call["ids"] for call in engine.calls] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))


async def test_choices_of_several_prompts_are_numbered_prompt_first(
    http: httpx.AsyncClient,
) -> None:
    body = await post(http, prompt=["x", "y"], n=2, best_of=2, max_tokens=2, echo=True)
    assert [choice["text"] for choice in body["choices"]] == ["xab", "xab", "yab", "yab"]
    assert body["usage"]["completion_tokens"] == 8


async def test_every_sampling_field_reaches_the_engine(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    fields = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 11,
        "n": 2,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "logprobs": 2,
        "prompt_logprobs": 3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "skip_special_tokens": False,
    }
    await post(http, prompt="p", stop="\n", logit_bias={"5": -1}, user="u", priority=-3, **fields)
    call = engine.calls[0]
    for name, value in fields.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(call["params"], name) == expected, name
    assert call["params"].stop == ("\n",)
    assert call["params"].logit_bias == {5: -1.0}
    assert (call["tenant"], call["priority"]) == ("u", -3)


async def test_null_is_as_good_as_absent(http: httpx.AsyncClient) -> None:
    body = await post(http, prompt="p", max_tokens=None, stop=None, logit_bias=None, suffix=None)
    assert body["choices"][0]["text"] == "abcdefghijklmnop"


async def test_echo_with_logprobs_scores_the_prompt(http: httpx.AsyncClient) -> None:
    body = await post(http, prompt="hey", max_tokens=0, echo=True, logprobs=1)
    choice = body["choices"][0]
    assert choice["text"] == "hey"
    assert choice["logprobs"] == {
        "tokens": ["h", "e", "y"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"e": -0.5, "z": -9999.0}, {"y": -0.5, "z": -9999.0}],
        "text_offset": [0, 1, 2],
    }
    assert body["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_extension(http: httpx.AsyncClient) -> None:
    body = await post(http, prompt="hey", max_tokens=1, prompt_logprobs=1)
    scores = body["choices"][0]["prompt_logprobs"]
    assert scores[0] is None
    assert scores[1]["101"] == {"logprob": -0.5, "rank": 1, "decoded_token": "e"}


async def test_stream_spells_the_whole_answer(http: httpx.AsyncClient) -> None:
    chunks = await stream(
        http, prompt=["x", "y"], max_tokens=3, echo=True, logprobs=0,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts = {0: "", 1: ""}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert texts == {0: "xabc", 1: "yabc"}
    assert offsets == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]].count("length") == 2


async def test_text_is_escaped_in_a_chunk(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, prompt='"\n\u2028\U0001f600', max_tokens=1, echo=True)
    assert chunks[0]["choices"][0]["text"] == '"\n\u2028\U0001f600a'
