"""What a server answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from giantserve.outputs import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A finished answer. ``text`` and ``finish_reason`` are those of the first choice.

    ``raw`` is the whole JSON body: logprobs and further choices stand in it as the server sent
    them.
    """

    texts: tuple[str, ...]
    finish_reasons: tuple[str | None, ...]
    usage: Usage
    model: str
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Reply:
        """Read the body of either endpoint."""
        choices = sorted(body["choices"], key=lambda choice: int(choice["index"]))
        usage = body["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return cls(
            texts=tuple(
                choice["message"]["content"] if "message" in choice else choice["text"]
                for choice in choices
            ),
            finish_reasons=tuple(choice["finish_reason"] for choice in choices),
            usage=Usage(
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
                cached_tokens=details.get("cached_tokens", 0),
            ),
            model=body["model"],
            raw=body,
        )

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def finish_reason(self) -> str | None:
        return self.finish_reasons[0]
