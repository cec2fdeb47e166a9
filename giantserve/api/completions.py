"""The answers of /v1/completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from giantserve.api.answer import Envelope
from giantserve.api.engine import TextCodec
from giantserve.api.generation import Collected, Prompt
from giantserve.api.logprobs import completion_logprobs, prompt_logprobs
from giantserve.api.protocol import CompletionRequest
from giantserve.outputs import Completion, PositionLogprobs, StreamDelta, Usage


class CompletionAnswer:
    """Text completions, with the prompt in front where the request asks for an echo."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[Prompt],
        codec: TextCodec,
        envelope: Envelope,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._codec = codec
        self._envelope = envelope
        self._null_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._prompt_logprobs: dict[int, tuple[PositionLogprobs | None, ...]] = {}
        self._sent_characters: dict[int, int] = {}

    def chunk(self, delta: StreamDelta) -> bytes:
        index = delta.index
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[index // self._request.n] = delta.prompt_logprobs
        first = index not in self._sent_characters
        text, logprobs = self._shown(
            index,
            delta.text,
            delta.token_ids,
            delta.logprobs or (),
            echo=self._request.echo and first,
            offset=self._sent_characters.get(index, 0),
        )
        self._sent_characters[index] = self._sent_characters.get(index, 0) + len(text)
        shown_logprobs = "null" if logprobs is None else json.dumps(logprobs)
        reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        stop = "" if delta.finish_reason is None else _stop_field(delta.stop_reason)
        return self._envelope.event(
            f'{{"index": {index}, "text": {json.dumps(text)}, "logprobs": {shown_logprobs}, '
            f'"finish_reason": {reason}{stop}}}',
            self._null_usage,
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def whole(self, collected: Collected, usage: Usage) -> dict[str, Any]:
        for position, scores in enumerate(collected.prompt_logprobs):
            if scores is not None:
                self._prompt_logprobs[position] = scores
        return self._envelope.body([self._choice(choice) for choice in collected.choices], usage)

    def _choice(self, choice: Completion) -> dict[str, Any]:
        text, logprobs = self._shown(
            choice.index,
            choice.text,
            choice.token_ids,
            choice.logprobs or (),
            echo=self._request.echo,
            offset=0,
        )
        shown: dict[str, Any] = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.prompt_logprobs is not None:
            scores = self._prompt_logprobs.get(choice.index // self._request.n, ())
            shown["prompt_logprobs"] = prompt_logprobs(self._codec, scores)
        return shown

    def _shown(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        positions: Sequence[PositionLogprobs | None],
        *,
        echo: bool,
        offset: int,
    ) -> tuple[str, dict[str, Any] | None]:
        position = index // self._request.n
        prompt = self._prompts[position]
        if echo:
            text = prompt.text + text
        if self._request.logprobs is None:
            return text, None
        if echo:
            token_ids = [*prompt.token_ids, *token_ids]
            positions = [*self._prompt_logprobs.get(position, ()), *positions]
        return text, completion_logprobs(self._codec, positions, token_ids, offset)


def _stop_field(stop_reason: str | int | None) -> str:
    return f', "stop_reason": {json.dumps(stop_reason)}'
