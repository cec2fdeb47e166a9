"""Log-probabilities in the shapes of the two endpoints. Natural logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from giantserve.api.engine import TextCodec
from giantserve.outputs import PositionLogprobs, TokenLogprob

LOWEST = -9999.0  # JSON has no -Infinity


def completion_logprobs(
    codec: TextCodec,
    positions: Sequence[PositionLogprobs | None],
    token_ids: Sequence[int],
    text_offset: int,
) -> dict[str, Any]:
    """The object of /v1/completions. A position without one (the first of a prompt) shows null.

    ``token_ids`` name the tokens; offsets count characters from ``text_offset``.
    """
    tokens = [codec.token_text(token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if p is None else _finite(p.chosen.logprob) for p in positions],
        "top_logprobs": [
            None
            if p is None
            else {codec.token_text(t.token_id): _finite(t.logprob) for t in _with_chosen(p)}
            for p in positions
        ],
        "text_offset": offsets,
    }


def chat_logprobs(codec: TextCodec, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    """The object of /v1/chat/completions."""
    return {
        "content": [
            {**_chat_token(codec, p.chosen), "top_logprobs": [_chat_token(codec, t) for t in p.top]}
            for p in positions
        ],
        "refusal": None,
    }


def prompt_logprobs(
    codec: TextCodec, positions: Sequence[PositionLogprobs | None]
) -> list[dict[str, Any] | None]:
    """The ``prompt_logprobs`` extension: by position, token ids to log-probabilities."""
    return [
        None
        if p is None
        else {
            str(t.token_id): {
                "logprob": _finite(t.logprob),
                "rank": t.rank,
                "decoded_token": codec.token_text(t.token_id),
            }
            for t in _with_chosen(p)
        }
        for p in positions
    ]


def _with_chosen(position: PositionLogprobs) -> list[TokenLogprob]:
    known = {token.token_id for token in position.top}
    extra = [] if position.chosen.token_id in known else [position.chosen]
    return [*position.top, *extra]


def _chat_token(codec: TextCodec, token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": codec.token_text(token.token_id),
        "logprob": _finite(token.logprob),
        "bytes": list(codec.token_bytes(token.token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
