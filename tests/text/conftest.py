"""Tokenizers of the three kinds of decoder, trained or written on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from giantserve.demo_tokenizer import train_tokenizer
from giantserve.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    train_tokenizer(folder, 1500)
    return folder


@pytest.fixture(scope="session")
def byte_level(demo_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """As Llama 2's: words marked by U+2581, unknown characters as byte tokens."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    text = ["the quick brown fox jumps over the lazy dog, again and again. Don't!"] * 4
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend = Backend(
        models.BPE(
            vocab={token: place for place, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    )


@pytest.fixture(scope="session")
def word_piece() -> Tokenizer:
    tokens = ["[UNK]", "[SEP]", "run", "##ning", "##s", "dog", ".", ",", "do", "n't"]
    backend = Backend(
        models.WordPiece(
            vocab={token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")
    )
