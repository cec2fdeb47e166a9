"""Prompts as users hand them over, made token ids or refused."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from giantserve.errors import InvalidRequestError

Prompt = str | Sequence[int]


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, of one where a single text or list of token ids is given.

    Raises InvalidRequestError for what is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidRequestError(
            f"prompts is {prompts!r}; give a text, a list of token ids, or a list of these"
        )
    batch: list[Any] = list(prompts)
    if batch and not isinstance(batch[0], str | Iterable):
        return [batch]
    return batch


def check_token_ids(
    token_ids: Iterable[Any], vocab_size: int, max_model_len: int
) -> tuple[int, ...]:
    """The ids as ints. Raises InvalidRequestError unless all are token ids of the model, at least
    one, and leave room in the context for one more."""
    if isinstance(token_ids, str | bytes) or not isinstance(token_ids, Iterable):
        raise InvalidRequestError(f"a prompt is {token_ids!r}; give a text or a list of token ids")
    ids = []
    for token_id in token_ids:
        try:
            ids.append(operator.index(token_id))
        except TypeError:
            raise InvalidRequestError(
                f"a prompt holds {token_id!r}; its token ids must be integers"
            ) from None
        if not 0 <= ids[-1] < vocab_size:
            raise InvalidRequestError(
                f"token id {ids[-1]} is outside the vocabulary of {vocab_size}; give ids from 0 to "
                f"{vocab_size - 1}"
            )
    if not ids:
        raise InvalidRequestError("the prompt is empty; give at least one token")
    if len(ids) >= max_model_len:
        raise InvalidRequestError(
            f"a prompt of {len(ids)} tokens leaves no room in the context of {max_model_len}; "
            "shorten it or raise max_model_len"
        )
    return tuple(ids)
