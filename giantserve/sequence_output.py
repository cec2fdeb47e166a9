"""One choice of one request as it grows: text, stopping rules and the increments to stream."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from giantserve.detokenizer import make_detokenizer
from giantserve.errors import InvalidRequestError
from giantserve.outputs import FinishReason, PositionLogprobs
from giantserve.sampling_params import SamplingParams
from giantserve.stop_matcher import StopMatcher
from giantserve.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Increment:
    """What one token added. ``text`` may lag behind ``token_ids`` until it is certain."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class SequenceOutput:
    """Decides, token by token, what text a choice has gained and whether it is at its end.

    Without a tokenizer the text stays empty, and stop strings raise ``InvalidRequestError``.
    ``end_token_ids`` are the model's; ``max_model_len`` limits prompt and output together.
    """

    def __init__(
        self,
        *,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        prompt_len: int,
        max_model_len: int,
        end_token_ids: Collection[int] = (),
    ) -> None:
        if params.stop and tokenizer is None:
            raise InvalidRequestError(
                "stop needs a tokenizer and this model has none; use stop_token_ids instead"
            )
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._min_tokens = params.min_tokens
        self._max_tokens = min(params.max_tokens, max_model_len - prompt_len)
        self._end_token_ids = frozenset(() if params.ignore_eos else end_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._detokenizer = (
            None if tokenizer is None else make_detokenizer(tokenizer, params.skip_special_tokens)
        )
        self._stops = StopMatcher(params.stop, params.include_stop_str_in_output)

    def append(self, token_id: int, logprobs: PositionLogprobs | None = None) -> Increment:
        """Take the next token. Not to be called again once an increment has a ``finish_reason``.

        An end or stop token keeps its id in the output, but not its text. ``stop_reason`` is the
        stop string or the stop token id, None for an end token. Nothing stops before the
        ``min_tokens``-th token but a limit on length.
        """
        assert self.finish_reason is None, "append after the end of the sequence"
        self.num_tokens += 1
        armed = self.num_tokens >= self._min_tokens
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        text = ""
        if armed and token_id in self._end_token_ids:
            finish_reason = FinishReason.STOP
        elif armed and token_id in self._stop_token_ids:
            finish_reason, stop_reason = FinishReason.STOP, token_id
        else:
            if self._detokenizer is not None:
                text = self._detokenizer.push(token_id)
            if self.num_tokens >= self._max_tokens:
                finish_reason = FinishReason.LENGTH
        if finish_reason is not None and self._detokenizer is not None:
            text += self._detokenizer.flush()
        text, stop = self._stops.feed(text, armed)
        if stop is not None:
            finish_reason, stop_reason = FinishReason.STOP, stop
        elif finish_reason is not None:
            text += self._stops.flush()
        self.finish_reason = finish_reason
        return Increment(
            text=text,
            token_ids=(token_id,),
            logprobs=None if logprobs is None else (logprobs,),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def abort(self) -> Increment:
        """End the sequence from outside; the increment carries the text held back so far."""
        self.finish_reason = FinishReason.ABORT
        tail = "" if self._detokenizer is None else self._detokenizer.flush()
        released, _ = self._stops.feed(tail, armed=False)
        return Increment(text=released + self._stops.flush(), finish_reason=FinishReason.ABORT)
