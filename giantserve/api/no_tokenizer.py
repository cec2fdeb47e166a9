"""What stands in for the tokenizer of a model that has none: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from giantserve.api.engine import ServingEngine, TextCodec
from giantserve.api.errors import ParameterError


class NoTokenizer:
    """Refuses text, and names tokens by their ids."""

    def encode(self, text: str) -> list[int]:
        self._refuse()

    def decode(self, token_ids: Sequence[int]) -> str:
        self._refuse()

    def render_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        self._refuse()

    def token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}"

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode()

    @staticmethod
    def _refuse() -> NoReturn:
        raise ParameterError("this model has no tokenizer; send the prompt as token ids", "prompt")


def codec_of(engine: ServingEngine) -> TextCodec:
    """The engine's tokenizer, or the stand-in."""
    return engine.tokenizer if engine.tokenizer is not None else NoTokenizer()
