"""What the HTTP face needs of an engine. `giantserve.async_engine.AsyncEngine` has it all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from giantserve.outputs import StreamDelta
from giantserve.sampling_params import SamplingParams


class TextCodec(Protocol):
    """The tokenizer's part of the contract."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def render_chat(self, messages: list[dict[str, Any]]) -> list[int]: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class ServingEngine(Protocol):
    """An engine that streams.

    Closing or cancelling what `generate` returns frees the request's blocks.
    """

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def tokenizer(self) -> TextCodec | None: ...

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
    ) -> AsyncIterator[StreamDelta]: ...

    async def check_health(self) -> None: ...

    async def stats(self) -> dict[str, Any]: ...
