"""How an endpoint words its answer: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from giantserve.api.generation import Collected
from giantserve.outputs import StreamDelta, Usage


class Answer(Protocol):
    """One endpoint's wording. Instances belong to one request and may remember what was sent."""

    def chunk(self, delta: StreamDelta) -> bytes:
        """One server-sent event."""

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event without choices that ends a stream whose client asked for the counts."""

    def whole(self, collected: Collected, usage: Usage) -> dict[str, Any]:
        """The JSON body of an answer that does not stream."""


class Envelope:
    """What every chunk of a stream repeats, serialised once."""

    def __init__(
        self, kind: str, chunk_kind: str, request_id: str, created: int, model: str
    ) -> None:
        self.request_id = request_id
        self._fields = {"id": request_id, "object": kind, "created": created, "model": model}
        head = json.dumps({**self._fields, "object": chunk_kind})
        self._prefix = f'data: {head[:-1]}, "choices": ['

    def event(self, choice: str, with_null_usage: bool) -> bytes:
        """``choice`` is one choice as JSON, or nothing."""
        end = '], "usage": null}\n\n' if with_null_usage else "]}\n\n"
        return f"{self._prefix}{choice}{end}".encode()

    def usage_event(self, usage: Usage) -> bytes:
        return f'{self._prefix}], "usage": {json.dumps(usage_object(usage))}}}\n\n'.encode()

    def body(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {**self._fields, "choices": list(choices), "usage": usage_object(usage)}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
