"""A sequence's end, text and increments, against a plain definition over the whole output."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantserve.errors import InvalidRequestError
from giantserve.outputs import FinishReason, PositionLogprobs, TokenLogprob
from giantserve.sampling_params import SamplingParams
from giantserve.sequence_output import Increment, SequenceOutput
from giantserve.stop_matcher import StopMatcher
from giantserve.tokenizer import Tokenizer

END = 1
STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT


def run(
    tokenizer: Tokenizer | None,
    params: SamplingParams,
    ids: list[int],
    prompt_len: int = 3,
    max_model_len: int = 1000,
) -> list[Increment]:
    output = SequenceOutput(
        index=0,
        params=params,
        tokenizer=tokenizer,
        prompt_len=prompt_len,
        max_model_len=max_model_len,
        end_token_ids=(END,),
    )
    increments = []
    for token_id in ids:
        increments.append(output.append(token_id))
        if increments[-1].finish_reason is not None:
            break
    assert output.num_tokens == len(increments)
    return increments


def outcome(increments: list[Increment]) -> tuple[str, int, FinishReason | None, str | int | None]:
    text = "".join(increment.text for increment in increments)
    last = increments[-1]
    return text, len(increments), last.finish_reason, last.stop_reason


def first_stop(text: str, start: int, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """End and name of the first stop string that ends after ``start``, by trying every place."""
    for end in range(start + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def offline(
    tokenizer: Tokenizer, params: SamplingParams, ids: list[int]
) -> tuple[str, int, FinishReason | None, str | int | None]:
    data = b""
    shown = 0
    for count, token_id in enumerate(ids, start=1):
        armed = count >= params.min_tokens
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if armed and token_id == END and not params.ignore_eos:
            reason = STOP
        elif armed and token_id in params.stop_token_ids:
            reason, stop_reason = STOP, token_id
        else:
            if not (params.skip_special_tokens and token_id in tokenizer.special_token_ids):
                data += tokenizer.token_bytes(token_id)
            if count >= params.max_tokens:
                reason = LENGTH
        text = codecs.utf_8_decode(data, "replace", reason is not None)[0]
        found = first_stop(text, shown, params.stop) if armed else None
        if found is not None:
            end, stop = found
            cut = end if params.include_stop_str_in_output else end - len(stop)
            return text[:cut], count, STOP, stop
        if reason is not None:
            return text, count, reason, stop_reason
        shown = len(text)
    raise AssertionError("the ids reach max_tokens")


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(),
    stops=st.lists(st.text("abé\ufffd", min_size=1, max_size=5), max_size=4),
    min_tokens=st.integers(0, 12),
    max_tokens=st.integers(12, 25),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    stop_token_ids=st.lists(st.integers(0, 5), max_size=1),
)
def test_streaming_equals_the_offline_definition(
    byte_level: Tokenizer,
    data: st.DataObject,
    stops: list[str],
    min_tokens: int,
    max_tokens: int,
    flags: tuple[bool, bool, bool],
    stop_token_ids: list[int],
) -> None:
    plain = [byte_level.encode(text, False)[0] for text in ("a", "b", "é", "🎉", "ab", "ba")]
    halves = [*byte_level.encode("é", False), *byte_level.encode("🎉", False)]
    choice = st.one_of(st.sampled_from(plain * 3 + halves), st.integers(0, 5))
    ids = data.draw(st.lists(choice, min_size=max_tokens, max_size=max_tokens))
    params = SamplingParams(
        stop=tuple(stops),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        ignore_eos=flags[0],
        include_stop_str_in_output=flags[1],
        skip_special_tokens=flags[2],
        stop_token_ids=tuple(stop_token_ids),
    )
    increments = run(byte_level, params, ids)
    assert outcome(increments) == offline(byte_level, params, ids)
    assert [i.token_ids for i in increments] == [(token_id,) for token_id in ids[: len(increments)]]
    assert all(increment.finish_reason is None for increment in increments[:-1])


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=5),
    include=st.booleans(),
)
def test_pieces_do_not_matter_and_nothing_is_held_needlessly(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    text = "".join(pieces)
    found = first_stop(text, 0, tuple(stops))
    matcher = StopMatcher(stops, include)
    released = ""
    for index, piece in enumerate(pieces):
        added, stop = matcher.feed(piece)
        released += added
        if stop is not None:
            assert found is not None
            assert stop == found[1]
            assert released == text[: found[0] if include else found[0] - len(stop)]
            return
        seen = "".join(pieces[: index + 1])
        starts = {stop[:size] for stop in stops for size in range(1, len(stop))}
        held = max((len(start) for start in starts if seen.endswith(start)), default=0)
        assert released == seen[: len(seen) - held]
    assert found is None
    assert released + matcher.flush() == text


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [token_id for text in texts for token_id in tokenizer.encode(text, False)]


def test_what_may_become_a_stop_string_waits(byte_level: Tokenizer) -> None:
    ids = ids_of(byte_level, "a", "E", "N", "x", "E", "N", "D", "z")
    increments = run(byte_level, SamplingParams(stop=("END",)), ids)
    assert [i.text for i in increments] == ["a", "", "", "ENx", "", "", ""]
    assert (increments[-1].finish_reason, increments[-1].stop_reason) == (STOP, "END")


def test_held_text_comes_at_the_end(byte_level: Tokenizer) -> None:
    ids = ids_of(byte_level, "a", "E", "N")
    increments = run(byte_level, SamplingParams(stop=("END",), max_tokens=3), ids)
    assert [i.text for i in increments] == ["a", "", "EN"]
    assert increments[-1].finish_reason is LENGTH
    increments = run(byte_level, SamplingParams(stop=("END",)), [*ids, END])
    assert outcome(increments) == ("aEN", 4, STOP, None)


@pytest.mark.parametrize("prompt_len", [7, 8, 9])
def test_the_model_length_ends_it(byte_level: Tokenizer, prompt_len: int) -> None:
    ids = ids_of(byte_level, *"abcdefgh")
    increments = run(byte_level, SamplingParams(), ids, prompt_len=prompt_len, max_model_len=10)
    assert outcome(increments) == ("abc"[: 10 - prompt_len], 10 - prompt_len, LENGTH, None)


def test_end_and_stop_tokens_keep_their_ids_but_not_their_text(byte_level: Tokenizer) -> None:
    a, b = ids_of(byte_level, "a", "b")
    params = SamplingParams(stop_token_ids=(b,), skip_special_tokens=False)
    increments = run(byte_level, params, [a, b, a])
    assert outcome(increments) == ("a", 2, STOP, b)
    assert increments[-1].token_ids == (b,)
    assert outcome(run(byte_level, params, [a, END])) == ("a", 2, STOP, None)


def test_ignore_eos_shows_it_or_skips_it(byte_level: Tokenizer) -> None:
    (a,) = ids_of(byte_level, "a")
    params = SamplingParams(ignore_eos=True, max_tokens=3)
    assert outcome(run(byte_level, params, [a, END, a])) == ("aa", 3, LENGTH, None)
    params = SamplingParams(ignore_eos=True, max_tokens=3, skip_special_tokens=False)
    assert outcome(run(byte_level, params, [a, END, a])) == ("a<|end|>a", 3, LENGTH, None)


def test_without_a_tokenizer() -> None:
    increments = run(None, SamplingParams(max_tokens=2), [5, 6])
    assert outcome(increments) == ("", 2, LENGTH, None)
    with pytest.raises(InvalidRequestError, match="use stop_token_ids"):
        run(None, SamplingParams(stop=("a",)), [5])


def test_logprobs_come_with_their_token() -> None:
    entry = PositionLogprobs(chosen=TokenLogprob(token_id=5, logprob=-1.0, rank=2))
    output = SequenceOutput(
        index=0, params=SamplingParams(), tokenizer=None, prompt_len=1, max_model_len=9
    )
    assert output.append(5, entry).logprobs == (entry,)
    assert output.append(5).logprobs is None


def test_abort_gives_out_what_was_held(byte_level: Tokenizer) -> None:
    output = SequenceOutput(
        index=0,
        params=SamplingParams(stop=("ab",)),
        tokenizer=byte_level,
        prompt_len=1,
        max_model_len=9,
    )
    assert output.append(ids_of(byte_level, "a")[0]).text == ""
    assert output.append(ids_of(byte_level, "🎉")[0]).text == ""
    assert output.abort() == Increment(text="a\ufffd", finish_reason=ABORT)
    assert output.finish_reason is ABORT
