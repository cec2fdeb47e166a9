"""Incremental detokenisation: each token's text as soon as it is certain."""

from __future__ import annotations

import abc
import codecs

from giantserve.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING = 16


class Detokenizer(abc.ABC):
    """Turns one sequence's ids into text, id by id. Not to be shared between threads."""

    @abc.abstractmethod
    def push(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character is incomplete."""

    @abc.abstractmethod
    def flush(self) -> str:
        """What was held back, with U+FFFD for a character that never came to its end."""


def make_detokenizer(tokenizer: Tokenizer, skip_special_tokens: bool = True) -> Detokenizer:
    """The detokenizer that fits: by bytes for byte-level BPE, by a window of ids for all others."""
    if tokenizer.is_byte_level:
        return ByteLevelDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, skip_special_tokens)


class ByteLevelDetokenizer(Detokenizer):
    """For byte-level BPE, whose text is the UTF-8 reading of its tokens' bytes: exact, O(1) a
    token.

    Pushed and flushed text together equals ``tokenizer.decode`` of all the ids, for any ids at all.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer(Detokenizer):
    """For any tokenizer: decodes a window of the last ids and takes what the newest ones added.

    The window starts with the ids of the previous piece of text, so that a decoder that joins words
    or strips the first space sees its context. Text that ends in U+FFFD is held back, for at most
    16 ids. Pushed and flushed text together equals ``tokenizer.decode`` of all the ids wherever
    these spell valid UTF-8; a decoder with byte fallback rewrites a run of byte tokens that turns
    out invalid, which text already given out cannot follow.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._num_context = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_context
        if text.endswith(_REPLACEMENT) and num_pending < _MAX_PENDING:
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        added = text[len(self._context_text) :]
        if added:
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._context_text = self._decode(self._window)
        return added

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
