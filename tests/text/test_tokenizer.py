"""The tokenizer beside a checkpoint: loading, chat templates, tokens as bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from giantserve.demo_tokenizer import train_tokenizer
from giantserve.end_tokens import read_end_token_ids
from giantserve.errors import CheckpointError, ConfigError, InvalidRequestError
from giantserve.tokenizer import Tokenizer, load_tokenizer

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def test_demo_tokenizer_is_deterministic(demo_folder: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path, 1500)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (demo_folder / name).read_bytes()


def test_demo_tokenizer_refuses_too_few_ids(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size is 299"):
        train_tokenizer(tmp_path, 299)


def test_encode_and_decode(byte_level: Tokenizer) -> None:
    assert byte_level.vocab_size == 1500
    assert byte_level.eos_token_ids == (1,)
    ids = byte_level.encode("return ☃")
    assert ids[0] == 0
    assert byte_level.decode(ids) == "return ☃"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|begin|>return ☃"
    assert byte_level.encode("return ☃", add_special_tokens=False) == ids[1:]
    assert byte_level.decode([10**9, -1]) == ""


def test_lone_surrogate_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="lone surrogate at character 2"):
        byte_level.encode("ab\ud800")


def test_render_chat(byte_level: Tokenizer) -> None:
    ids = byte_level.render_chat(CHAT)
    assert byte_level.decode(ids, skip_special_tokens=False) == (
        "<|begin|><|system|>\nbe brief<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n"
    )
    shorter = byte_level.render_chat(CHAT, add_generation_prompt=False)
    assert ids[: len(shorter)] == shorter
    assert byte_level.decode(ids[len(shorter) :], False) == "<|assistant|>\n"


def test_chat_refusals(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="unknown role wizard"):
        byte_level.render_chat([{"role": "wizard", "content": "hi"}])
    with pytest.raises(InvalidRequestError, match="takes no tools"):
        byte_level.render_chat(CHAT, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        byte_level.render_chat([])
    with pytest.raises(InvalidRequestError, match="no chat template; use /v1/completions"):
        byte_fallback.render_chat(CHAT)


def test_token_bytes(
    byte_level: Tokenizer, byte_fallback: Tokenizer, word_piece: Tokenizer
) -> None:
    ids = byte_level.encode(" x🎉", add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, ids)) == " x🎉".encode()
    assert byte_level.token_text(ids[-1]) == "\ufffd"
    assert byte_level.token_bytes(1) == b"<|end|>"
    assert byte_level.token_bytes(1500) == b""
    ids = byte_fallback.encode("the é", add_special_tokens=False)
    assert b"".join(map(byte_fallback.token_bytes, ids)) == " the é".encode()
    assert word_piece.token_text(2) == "run"


def test_threads_share_a_tokenizer(byte_level: Tokenizer) -> None:
    texts = [f"def f{number}(): return '☃' * {number}" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(byte_level.encode, texts))
        assert list(pool.map(byte_level.decode, ids)) == texts


def test_end_tokens_come_from_the_checkpoint_too(demo_folder: Path, tmp_path: Path) -> None:
    for path in demo_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert read_end_token_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 5}}))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == (1, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 1]}))
    assert read_end_token_ids(tmp_path) == {1, 9}
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == (1, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        read_end_token_ids(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_end_token_ids(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_modules_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, giantserve.sequence_output, giantserve.demo_tokenizer;"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
