"""What both clients send and read: request bodies and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from giantserve.client.error_mapping import error_in_stream

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
DEFAULT_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 5.0


def completion_body(model: str, prompt: Prompt, options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a completion request."""
    text_or_ids = prompt if isinstance(prompt, str) else list(prompt)
    return {"model": model, "prompt": text_or_ids, **options}


def chat_body(model: str, messages: Messages, options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a chat request; a plain string is one user's turn."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"model": model, "messages": turns, **options}


def headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def read_event(line: str) -> dict[str, Any] | None:
    """The chunk on one line of a stream; None for blank lines and the end mark.

    Raises the typed error of an error event.
    """
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    chunk: dict[str, Any] = json.loads(line[6:])
    if "error" in chunk:
        raise error_in_stream(chunk["error"])
    return chunk


def text_of(chunk: Mapping[str, Any]) -> str:
    """The text that a chunk adds to the first choice."""
    return "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for choice in chunk["choices"]
        if choice["index"] == 0
    )
