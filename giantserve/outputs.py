"""What comes back from the engine: log-probabilities, finished outputs and streamed deltas."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in OpenAI's words (``abort`` is ours: the client left)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token with its natural-log probability under the raw (unscaled, unpenalised) logits."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """The chosen token at one position and the ``top`` most likely ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request. ``cached_tokens`` are prompt tokens whose KV was reused."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamDelta:
    """What is new in one choice of one request since its last delta.

    ``finish_reason`` is set on the last delta of a choice. ``usage`` is set on the very last delta
    of the request. ``prompt_logprobs`` comes with the first delta: one entry a prompt token, the
    first one None.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(slots=True, kw_only=True)
class Completion:
    """One whole choice of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A finished request. ``text``, ``token_ids``, ... are those of the first choice."""

    request_id: str
    prompt_token_ids: list[int]
    choices: list[Completion]
    usage: Usage | None = None
    prompt: str | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    time_to_first_token_s: float = 0.0
    latency_s: float = 0.0

    def add(self, delta: StreamDelta, elapsed_s: float) -> None:
        """Append what a delta brings; ``elapsed_s`` counts from the request's submission."""
        choice = self.choices[delta.index]
        if not any(c.token_ids for c in self.choices):
            self.time_to_first_token_s = elapsed_s
        choice.text += delta.text
        choice.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or []), *delta.logprobs]
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.usage is not None:
            self.usage = delta.usage
            self.latency_s = elapsed_s

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[PositionLogprobs] | None:
        return self.choices[0].logprobs
