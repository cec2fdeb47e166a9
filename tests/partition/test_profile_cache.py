"""Profiles that are kept: the same as made anew, for as long as what they were made from is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from partition import ModelProfile
from partition.profile_cache import cache_path, known_or_made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def never() -> ModelProfile:
    raise AssertionError("made once more")


def test_what_is_kept_is_what_was_made(model: Path, tmp_path: Path) -> None:
    made = ModelProfile.from_pretrained(model)
    cache = tmp_path / "cache"
    assert known_or_made(model, "auto", False, lambda: made, cache) is made
    kept = known_or_made(model, "auto", False, never, cache)
    assert kept == made and kept is not made


def test_another_config_dtype_or_broken_file_is_made_anew(model: Path, tmp_path: Path) -> None:
    made = ModelProfile.from_pretrained(model)
    cache = tmp_path / "cache"
    known_or_made(model, "auto", False, lambda: made, cache)
    with pytest.raises(AssertionError, match="once more"):
        known_or_made(model, "float32", False, never, cache)
    path = cache_path(model, "auto", cache)
    assert path is not None
    whole = path.read_text()
    for broken in (whole[:-40], "{}", whole.replace('"layers.0', '"layers.zero').replace("{", "[")):
        path.write_text(broken)
        assert known_or_made(model, "auto", False, lambda: made, cache) is made
        assert known_or_made(model, "auto", False, never, cache) == made, "it is kept again"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(AssertionError, match="once more"):
        known_or_made(model, "auto", False, never, cache)


def test_code_of_its_own_and_no_config_keep_nothing(model: Path, tmp_path: Path) -> None:
    made = ModelProfile.from_pretrained(model)
    cache = tmp_path / "cache"
    known_or_made(model, "auto", True, lambda: made, cache)
    known_or_made(tmp_path / "none", "auto", False, lambda: made, cache)
    assert not cache.exists()
