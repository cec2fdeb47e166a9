"""The messages of a chat: text only, as a string or as a list of text parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def _as_text(value: object) -> object:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    return "".join(_part_text(part) for part in value)


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is not None and kind != "text":
        raise ValueError(f"content parts of type {kind!r} are not supported; send text")
    if not isinstance(part, dict) or set(part) != {"type", "text"}:
        raise ValueError('a content part must be {"type": "text", "text": "..."}')
    text = part["text"]
    if not isinstance(text, str):
        raise ValueError("the text of a content part must be a string")
    return text


class Message(BaseModel):
    """One turn.

    Keys whose value is null are as good as absent, so that answers can be sent back.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("a message must be an object")
        return {key: value for key, value in data.items() if value is not None}

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees; it knows ``developer`` by the older name ``system``."""
        role = "system" if self.role == "developer" else self.role
        turn = {"role": role, "content": self.content}
        return turn if self.name is None else {**turn, "name": self.name}
