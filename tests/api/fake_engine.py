"""A small engine that spells: token ids are code points, and it answers with a known text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from giantserve.outputs import (
    FinishReason,
    PositionLogprobs,
    StreamDelta,
    TokenLogprob,
    Usage,
)
from giantserve.sampling_params import SamplingParams


class CharacterTokenizer:
    """One character, one token."""

    eos_token_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def render_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        return self.encode(
            "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
        )


class FakeEngine:
    """Answers ``abcd...``, one token a delta. Records what it was asked and what was aborted."""

    def __init__(self, *, max_model_len: int = 64, error: Exception | None = None) -> None:
        self.model_name = "fake"
        self.max_model_len = max_model_len
        self.tokenizer: CharacterTokenizer | None = CharacterTokenizer()
        self.error = error
        self.fail_after = 0
        self.stall_after: int | None = None
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.stalled = asyncio.Event()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[StreamDelta, None]:
        self.calls.append(
            {
                "ids": list(prompt_token_ids),
                "params": params,
                "tenant": tenant,
                "priority": priority,
            }
        )
        self.running.add(request_id)
        finished = False
        try:
            for step in range(params.max_tokens):
                if self.error is not None and step >= self.fail_after:
                    raise self.error
                if self.stall_after is not None and step >= self.stall_after:
                    self.stalled.set()
                    await asyncio.Event().wait()
                for index in range(params.n):
                    yield self._delta(request_id, prompt_token_ids, params, step, index)
                await asyncio.sleep(0)
            finished = True
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    def _delta(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        step: int,
        index: int,
    ) -> StreamDelta:
        token = ord("a") + step
        last = step == params.max_tokens - 1
        scores: tuple[PositionLogprobs | None, ...] | None = None
        if params.prompt_logprobs is not None and step == 0 and index == 0:
            scores = (None, *(score(token_id) for token_id in prompt[1:]))
        usage = Usage(
            prompt_tokens=len(prompt),
            completion_tokens=params.max_tokens * params.n,
            cached_tokens=1,
        )
        return StreamDelta(
            request_id=request_id,
            index=index,
            text=chr(token),
            token_ids=(token,),
            logprobs=None if params.logprobs is None else (score(token),),
            prompt_logprobs=scores,
            finish_reason=FinishReason.LENGTH if last else None,
            usage=usage if last and index == params.n - 1 else None,
        )

    async def stats(self) -> dict[str, Any]:
        return {"generated_tokens": 7, "calls": len(self.calls)}

    async def check_health(self) -> None:
        if self.error is not None:
            raise self.error


def score(token_id: int) -> PositionLogprobs:
    """The token itself at -0.5, and ``z`` certain not to come."""
    chosen = TokenLogprob(token_id=token_id, logprob=-0.5, rank=1)
    never = TokenLogprob(token_id=ord("z"), logprob=float("-inf"), rank=2)
    return PositionLogprobs(chosen=chosen, top=(chosen, never))
