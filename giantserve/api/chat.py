"""The answers of /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any

from giantserve.api.answer import Envelope
from giantserve.api.engine import TextCodec
from giantserve.api.generation import Collected
from giantserve.api.logprobs import chat_logprobs, prompt_logprobs
from giantserve.api.protocol import ChatCompletionRequest
from giantserve.outputs import Completion, StreamDelta, Usage


class ChatAnswer:
    """Assistant messages.

    The role comes with a choice's first text, so the first token waits for nothing.
    """

    def __init__(
        self, request: ChatCompletionRequest, codec: TextCodec, envelope: Envelope
    ) -> None:
        self._request = request
        self._codec = codec
        self._envelope = envelope
        self._null_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._begun: set[int] = set()

    def chunk(self, delta: StreamDelta) -> bytes:
        index = delta.index
        role = ""
        if index not in self._begun:
            self._begun.add(index)
            role = '"role": "assistant", '
        logprobs = "null"
        if self._request.logprobs:
            logprobs = json.dumps(chat_logprobs(self._codec, delta.logprobs or ()))
        end = '"finish_reason": null}'
        if delta.finish_reason is not None:
            stop = json.dumps(delta.stop_reason)
            end = f'"finish_reason": "{delta.finish_reason}", "stop_reason": {stop}}}'
        return self._envelope.event(
            f'{{"index": {index}, "delta": {{{role}"content": {json.dumps(delta.text)}}}, '
            f'"logprobs": {logprobs}, {end}',
            self._null_usage,
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def whole(self, collected: Collected, usage: Usage) -> dict[str, Any]:
        body = self._envelope.body([self._choice(choice) for choice in collected.choices], usage)
        if self._request.prompt_logprobs is not None:
            scores = collected.prompt_logprobs[0] or ()
            body["prompt_logprobs"] = prompt_logprobs(self._codec, scores)
        return body

    def _choice(self, choice: Completion) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs:
            logprobs = chat_logprobs(self._codec, choice.logprobs or ())
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
