"""The requests that are being answered: what each of their choices has gained, and who takes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from giantserve.errors import GiantserveError, InvalidRequestError
from giantserve.outputs import StreamDelta, Usage
from giantserve.request import Request
from giantserve.sampling_params import SamplingParams
from giantserve.sequence_output import SequenceOutput
from giantserve.step import SampledToken
from giantserve.tokenizer import Tokenizer

Sink = Callable[[StreamDelta | GiantserveError], None]
"""Takes a request's deltas in order, called from the engine's thread; an error is the last thing it
takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request as it was handed in. Its token ids are checked; times are of the monotonic
    clock."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sink: Sink
    tenant: str
    priority: int
    arrival_s: float
    deadline_s: float | None


@dataclass(slots=True, kw_only=True)
class _Choice:
    """One sequence of a request."""

    request: Request
    output: SequenceOutput
    prompt_logprobs: list[Any] | None


@dataclass(slots=True, kw_only=True)
class _Ticket:
    """A request until its last choice ends."""

    request_id: str
    sink: Sink
    choices: dict[int, _Choice] = field(default_factory=dict)
    completion_tokens: int = 0


class OpenRequests:
    """For the engine's thread alone. A request of ``n`` choices is n sequences, each with an id of
    its own."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        end_token_ids: Sequence[int],
        max_model_len: int,
        seed: int,
    ) -> None:
        """``seed``, and its place among those sequences, make that of one that draws and brings
        none."""
        self._tokenizer = tokenizer
        self._end_token_ids = tuple(end_token_ids)
        self._max_model_len = max_model_len
        self._seed = seed
        self._ids = itertools.count(1)
        self._unseeded = itertools.count()
        self._tickets: dict[str, _Ticket] = {}
        self._by_sequence: dict[int, _Ticket] = {}

    def open(self, given: Submission) -> list[Request]:
        """The sequences to schedule. Raises InvalidRequestError for an id that is taken, or a stop
        string without a tokenizer."""
        if given.request_id in self._tickets:
            raise InvalidRequestError(f"a request with id {given.request_id} is running already")
        params, prompt = given.params, given.prompt_token_ids
        ticket = _Ticket(request_id=given.request_id, sink=given.sink)
        for index in range(params.n):
            seq_id = next(self._ids)
            request = Request(
                seq_id=seq_id,
                request_id=given.request_id,
                prompt_token_ids=prompt,
                sampling=params,
                seed=self._seed_of(params) + index,
                tenant=given.tenant,
                priority=given.priority,
                arrival_s=given.arrival_s,
                deadline=None if given.deadline_s is None else given.arrival_s + given.deadline_s,
                end_token_ids=self._end_ids(params),
            )
            output = SequenceOutput(
                index=index,
                params=params,
                tokenizer=self._tokenizer,
                prompt_len=len(prompt),
                max_model_len=self._max_model_len,
                end_token_ids=self._end_token_ids,
            )
            ticket.choices[seq_id] = _Choice(
                request=request,
                output=output,
                prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
            )
        self._tickets[given.request_id] = ticket
        self._by_sequence.update(dict.fromkeys(ticket.choices, ticket))
        return [choice.request for choice in ticket.choices.values()]

    def forget(self, request_id: str) -> list[int]:
        """Give a request up, and return its sequences that have not ended; nothing goes to its
        sink any more."""
        ticket = self._tickets.pop(request_id, None)
        if ticket is None:
            return []
        for seq_id in ticket.choices:
            del self._by_sequence[seq_id]
        return list(ticket.choices)

    def request_id(self, seq_id: int) -> str:
        """Whose the sequence is, which must be open."""
        return self._by_sequence[seq_id].request_id

    def sink(self, request_id: str) -> Sink | None:
        """Who takes the request's deltas; None where it is not open."""
        ticket = self._tickets.get(request_id)
        return None if ticket is None else ticket.sink

    def num_tokens(self, seq_id: int) -> int | None:
        """How many tokens a sequence has gained; None where it is not open."""
        ticket = self._by_sequence.get(seq_id)
        return None if ticket is None else ticket.choices[seq_id].output.num_tokens

    def take_prompt_logprobs(self, seq_id: int, start: int, logprobs: Sequence[Any]) -> None:
        """Those of the prompt's positions after ``start``; a prompt that was preempted half-way
        comes by again."""
        ticket = self._by_sequence.get(seq_id)
        if ticket is not None:
            known = ticket.choices[seq_id].prompt_logprobs
            assert known is not None
            known[start + 1 :] = logprobs

    def take(self, token: SampledToken) -> tuple[Sink, StreamDelta]:
        """What a token adds to its sequence, which must be open, and who takes it. With a reason
        to finish the sequence is forgotten, with the last one the request."""
        ticket = self._by_sequence[token.seq_id]
        choice = ticket.choices[token.seq_id]
        is_first = choice.output.num_tokens == 0
        increment = choice.output.append(token.token_id, token.logprobs)
        ticket.completion_tokens += 1
        has_ended = increment.finish_reason is not None
        prompt_logprobs = choice.prompt_logprobs if is_first else None
        return ticket.sink, StreamDelta(
            request_id=ticket.request_id,
            index=choice.output.index,
            text=increment.text,
            token_ids=increment.token_ids,
            logprobs=increment.logprobs,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            finish_reason=increment.finish_reason,
            stop_reason=increment.stop_reason,
            usage=self._retire(ticket, choice) if has_ended else None,
        )

    def __iter__(self) -> Iterator[int]:
        """The sequences that have not ended."""
        return iter(list(self._by_sequence))

    def fail_all(self, error: GiantserveError) -> None:
        """End every request with ``error``."""
        for ticket in self._tickets.values():
            ticket.sink(error)
        self._tickets.clear()
        self._by_sequence.clear()

    def _retire(self, ticket: _Ticket, choice: _Choice) -> Usage | None:
        """Forget a finished choice; the usage of the whole request with the last one."""
        seq_id = choice.request.seq_id
        del self._by_sequence[seq_id], ticket.choices[seq_id]
        if ticket.choices:
            return None
        del self._tickets[ticket.request_id]
        return Usage(
            prompt_tokens=len(choice.request.prompt_token_ids),
            completion_tokens=ticket.completion_tokens,
            cached_tokens=choice.request.num_cached_tokens,
        )

    def _seed_of(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        if not params.temperature:  # nothing is drawn, as for the tokens of health checks
            return 0
        return self._seed * 1_000_003 + next(self._unseeded) * 7919

    def _end_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that would end the sequence, and are barred until ``min_tokens``."""
        model = () if params.ignore_eos else self._end_token_ids
        return tuple({*model, *params.stop_token_ids})
