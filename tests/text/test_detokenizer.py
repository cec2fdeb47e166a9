"""What is streamed, plus what is flushed, is what decoding everything at once gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantserve.detokenizer import ByteLevelDetokenizer, WindowDetokenizer, make_detokenizer
from giantserve.tokenizer import Tokenizer

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    detokenizer = make_detokenizer(tokenizer, skip)
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])


def test_the_kind_follows_the_decoder(
    byte_level: Tokenizer, byte_fallback: Tokenizer, word_piece: Tokenizer
) -> None:
    assert isinstance(make_detokenizer(byte_level), ByteLevelDetokenizer)
    assert isinstance(make_detokenizer(byte_fallback), WindowDetokenizer)
    assert isinstance(make_detokenizer(word_piece), WindowDetokenizer)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 1510), max_size=40), skip=st.booleans())
def test_byte_level_equals_decode_for_any_ids(
    byte_level: Tokenizer, ids: list[int], skip: bool
) -> None:
    assert streamed(byte_level, ids, skip) == byte_level.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(6, 261), max_size=60))
def test_byte_level_equals_decode_for_any_bytes(byte_level: Tokenizer, ids: list[int]) -> None:
    assert streamed(byte_level, ids) == byte_level.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_valid_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert streamed(byte_level, ids) == text
    detokenizer = make_detokenizer(byte_level)
    assert "".join(map(detokenizer.push, ids)) == text
    assert detokenizer.flush() == ""


@settings(max_examples=200, deadline=None)
@given(text=TEXT, more=st.lists(st.sampled_from([1, 2]), max_size=3), skip=st.booleans())
def test_byte_fallback_equals_decode_for_valid_text(
    byte_fallback: Tokenizer, text: str, more: list[int], skip: bool
) -> None:
    ids = [*more, *byte_fallback.encode(text), *more]
    assert streamed(byte_fallback, ids, skip) == byte_fallback.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 9), max_size=20), skip=st.booleans())
def test_word_piece_equals_decode(word_piece: Tokenizer, ids: list[int], skip: bool) -> None:
    assert streamed(word_piece, ids, skip) == word_piece.decode(ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_an_emoji_comes_whole_with_its_last_token(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("a🎉b", add_special_tokens=False)
    detokenizer = make_detokenizer(tokenizer)
    pieces = [piece for piece in map(detokenizer.push, ids) if piece]
    assert pieces == ["a", "🎉", "b"]
    assert len(ids) >= 6


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_half_an_emoji_shows_as_replacement_at_the_end(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("a🎉", add_special_tokens=False)[:-1]
    detokenizer = make_detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids)) == "a"
    assert set(detokenizer.flush()) == {"\ufffd"}
    assert detokenizer.flush() == ""


def test_endless_invalid_bytes_are_not_held_for_ever(byte_fallback: Tokenizer) -> None:
    detokenizer = make_detokenizer(byte_fallback)
    first_byte = 3
    text = "".join(detokenizer.push(first_byte + 0x80) for _ in range(400))
    assert 380 < len(text) <= 400
    assert set(text) == {"\ufffd"}
