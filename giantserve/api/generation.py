"""One HTTP request's work in the engine: its prompts' choices merged into one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from giantserve.api.engine import ServingEngine
from giantserve.api.metrics import Metrics
from giantserve.outputs import Completion, PositionLogprobs, StreamDelta, Usage
from giantserve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as the engine takes it. ``text`` is what an echo shows."""

    token_ids: Sequence[int]
    text: str = ""


class Generation:
    """The answer to one HTTP request, while it is made.

    Choice ``i`` of prompt ``p`` has the index ``p * n + i``. ``usage`` is complete when the stream
    ends. ``score_only``: the engine must sample a token to score a prompt; that token is not shown
    or counted.
    """

    def __init__(
        self,
        engine: ServingEngine,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        request_id: str,
        tenant: str,
        priority: int,
        metrics: Metrics,
        score_only: bool = False,
    ) -> None:
        self.prompts = prompts
        self.request_id = request_id
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._engine = engine
        self._params = params
        self._tenant = tenant
        self._priority = priority
        self._metrics = metrics
        self._score_only = score_only
        self._choices_per_prompt = params[0].n
        self._first_token_s: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self._choices_per_prompt

    def prompt_of(self, choice: int) -> int:
        """The position of the prompt that a choice answers."""
        return choice // self._choices_per_prompt

    async def stream(self) -> AsyncGenerator[StreamDelta, None]:
        """Deltas with the index of the choice within the HTTP request, as the engine makes them.

        Closing it aborts what runs. Raises what the engine raises.
        """
        started_s = time.perf_counter()
        deltas = self._one(0) if len(self.prompts) == 1 else self._many()
        async with aclosing(deltas):
            async for delta in deltas:
                self._measure(delta, started_s)
                if self._score_only:
                    delta = replace(delta, text="", token_ids=(), logprobs=None)
                yield delta
        self._metrics.tokens(
            self.usage.prompt_tokens, self.usage.cached_tokens, self.usage.completion_tokens
        )

    async def collect(self) -> Collected:
        """Run to the end and gather whole choices."""
        collected = Collected(
            choices=[Completion(index=index) for index in range(self.num_choices)],
            prompt_logprobs=[None] * len(self.prompts),
        )
        async with aclosing(self.stream()) as deltas:
            async for delta in deltas:
                collected.add(delta, self.prompt_of(delta.index))
        return collected

    async def _one(self, position: int) -> AsyncGenerator[StreamDelta, None]:
        first_index = position * self._choices_per_prompt
        suffix = f"-{position}" if len(self.prompts) > 1 else ""
        deltas = self._engine.generate(
            self.prompts[position].token_ids,
            self._params[position],
            request_id=self.request_id + suffix,
            tenant=self._tenant,
            priority=self._priority,
        )
        async with closing_stream(deltas):
            async for delta in deltas:
                yield replace(delta, index=first_index + delta.index) if first_index else delta

    async def _many(self) -> AsyncGenerator[StreamDelta, None]:
        queue: asyncio.Queue[StreamDelta | Exception | None] = asyncio.Queue()

        async def pump(position: int) -> None:
            try:
                async with aclosing(self._one(position)) as deltas:
                    async for delta in deltas:
                        queue.put_nowait(delta)
            except Exception as error:
                queue.put_nowait(error)
            else:
                queue.put_nowait(None)

        pumps = [asyncio.ensure_future(pump(position)) for position in range(len(self.prompts))]
        running = len(pumps)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, StreamDelta):
                    yield item
                elif item is None:
                    running -= 1
                else:
                    raise item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _measure(self, delta: StreamDelta, started_s: float) -> None:
        now_s = time.perf_counter()
        if delta.token_ids:
            if not self._first_token_s:
                self._metrics.first_token(now_s - started_s)
            self._first_token_s.setdefault(delta.index, now_s)
            seen = self._num_tokens.get(delta.index, 0) + len(delta.token_ids)
            self._num_tokens[delta.index] = seen
        tokens = self._num_tokens.get(delta.index, 0)
        if delta.finish_reason is not None and tokens > 1:
            elapsed_s = now_s - self._first_token_s[delta.index]
            self._metrics.time_per_token(elapsed_s / (tokens - 1))
        if delta.usage is not None:
            completion_tokens = 0 if self._score_only else delta.usage.completion_tokens
            self.usage = Usage(
                prompt_tokens=self.usage.prompt_tokens + delta.usage.prompt_tokens,
                completion_tokens=self.usage.completion_tokens + completion_tokens,
                cached_tokens=self.usage.cached_tokens + delta.usage.cached_tokens,
            )


@asynccontextmanager
async def closing_stream(deltas: AsyncIterator[StreamDelta]) -> AsyncGenerator[None, None]:
    """Close the engine's stream on the way out, which frees the request's blocks."""
    try:
        yield
    finally:
        close = getattr(deltas, "aclose", None)
        if close is not None:
            await close()


@dataclass(slots=True, kw_only=True)
class Collected:
    """Whole choices, by index, and the prompts' log-probabilities where they were asked for."""

    choices: list[Completion]
    prompt_logprobs: list[tuple[PositionLogprobs | None, ...] | None]

    def add(self, delta: StreamDelta, prompt: int) -> None:
        choice = self.choices[delta.index]
        choice.text += delta.text
        choice.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + list(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = delta.prompt_logprobs
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
