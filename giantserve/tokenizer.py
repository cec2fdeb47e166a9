"""Text to token ids and back, by the tokenizer that lies beside the checkpoint."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from giantserve.end_tokens import read_end_token_ids
from giantserve.errors import CheckpointError, InvalidRequestError

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)


class Tokenizer:
    """A transformers tokenizer behind a small, thread-safe surface.

    ``vocab_size`` counts the ids the tokenizer knows, added tokens included; a model may have more.
    Ids beyond it decode to nothing. ``eos_token_ids`` end a sequence: those that the checkpoint
    declares, and the tokenizer's own. transformers is imported when the first tokenizer is loaded.
    """

    def __init__(self, tokenizer: Any, end_token_ids: frozenset[int] = frozenset()) -> None:
        """Wrap a loaded transformers tokenizer; ``end_token_ids`` are those of the checkpoint."""
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        own = tokenizer.eos_token_id
        self.eos_token_ids = tuple(sorted(end_token_ids | ({own} if own is not None else set())))
        self.vocab_size: int = len(tokenizer)
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self.is_byte_level = _is_byte_level(self._backend)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._tokenizer, frozenset(self.eos_token_ids))

    @classmethod
    def from_pretrained(cls, path: str | Path, trust_remote_code: bool = False) -> Tokenizer:
        """Load the tokenizer of the model folder ``path``; nothing is fetched from anywhere.

        Raises ``CheckpointError`` if there is none or it cannot be loaded.
        """
        folder = Path(path)
        if not has_tokenizer(folder):
            raise CheckpointError(
                f"{folder} holds no tokenizer (none of {', '.join(_FILES)}); add its files, "
                "or send token ids instead of text"
            )
        end_token_ids = read_end_token_ids(folder)
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"cannot load the tokenizer in {folder}: {reason}; restore its files"
            ) from error
        return cls(tokenizer, end_token_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``; raises ``InvalidRequestError`` if it is not valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text has a lone surrogate at character {error.start}; send valid Unicode"
            ) from error
        with self._lock:
            ids: list[int] = self._tokenizer.encode(
                text, add_special_tokens=add_special_tokens, verbose=False
            )
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids, without clean-up of spaces."""
        known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
        if self._backend is not None:
            text: str = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
            return text
        with self._lock:
            text = self._tokenizer.decode(
                known,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of a conversation under the model's own chat template.

        Raises ``InvalidRequestError`` if the model has no template, if the template knows no tools
        though ``tools`` are given, or if it refuses the messages (a role it does not know, for
        one).
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions with a plain prompt, or put "
                "a chat_template.jinja into the model's folder"
            )
        if not messages:
            raise InvalidRequestError("messages is empty; send at least one message")
        tool_list = [dict(tool) for tool in tools] if tools else None
        try:
            if tool_list and "tools" not in self._tokenizer.get_chat_template(tools=tool_list):
                raise InvalidRequestError(
                    "this model's chat template takes no tools; leave tools out of the request"
                )
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tool_list,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except InvalidRequestError:
            raise
        except Exception as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}; check roles, their "
                "order and contents"
            ) from error
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, possibly part of a character; empty if unknown."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _find_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            return b""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if isinstance(token, bytes):
            return token
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:
                return str(token).encode()
        if _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        if token_id not in self.special_token_ids and "\u2581" in token:
            return str(token).replace("\u2581", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()


def has_tokenizer(model_path: str | Path) -> bool:
    """Whether a model folder holds any of the files that tokenizers are saved as."""
    return any(any(Path(model_path).glob(name)) for name in _FILES)


def load_tokenizer(model_path: str | Path, trust_remote_code: bool = False) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None if it has none (it then serves token ids only).

    Raises ``CheckpointError`` if there is one that cannot be loaded.
    """
    if not has_tokenizer(model_path):
        return None
    return Tokenizer.from_pretrained(model_path, trust_remote_code)


def _is_byte_level(backend: Any) -> bool:
    if backend is None:
        return False
    from tokenizers.decoders import ByteLevel

    return isinstance(backend.decoder, ByteLevel)


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, others for U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_characters()
