"""Every sampling parameter is checked; the message names the field, the value and the limit."""

from __future__ import annotations

import dataclasses
import math
import pickle
from fractions import Fraction
from typing import Any

import pytest

from giantserve.errors import InvalidRequestError
from giantserve.sampling_params import SamplingParams

BAD: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "integer from 1"),
    ("max_tokens", -5, "integer from 1"),
    ("max_tokens", 1.0, "integer from 1"),
    ("max_tokens", True, "integer from 1"),
    ("max_tokens", None, "integer from 1"),
    ("min_tokens", -1, "integer from 0"),
    ("temperature", -0.1, "from 0 to 100"),
    ("temperature", 100.5, "from 0 to 100"),
    ("temperature", math.nan, "from 0 to 100"),
    ("temperature", math.inf, "from 0 to 100"),
    ("temperature", 10**400, "from 0 to 100"),
    ("temperature", "1", "from 0 to 100"),
    ("temperature", False, "from 0 to 100"),
    ("top_k", -2, "from -1"),
    ("top_k", 2.5, "from -1"),
    ("top_p", 0.0, "above 0 and up to 1"),
    ("top_p", 1.01, "above 0 and up to 1"),
    ("top_p", math.nan, "above 0 and up to 1"),
    ("min_p", -0.1, "from 0 to 1"),
    ("min_p", 1.1, "from 0 to 1"),
    ("seed", 1.5, "an integer"),
    ("seed", "7", "an integer"),
    ("seed", True, "an integer"),
    ("n", 0, "from 1 to 128"),
    ("n", 129, "from 1 to 128"),
    ("stop", "", "1 to 1024 characters"),
    ("stop", ["a", 3], "1 to 1024 characters"),
    ("stop", ["a" * 1025], "1 to 1024 characters"),
    ("stop", ["a"] * 65, "at most 64 strings"),
    ("stop", b"a", "at most 64 strings"),
    ("stop", 5, "at most 64 strings"),
    ("stop_token_ids", 5, "at most 1024"),
    ("stop_token_ids", [-1], "from 0"),
    ("stop_token_ids", ["5"], "from 0"),
    ("stop_token_ids", list(range(1025)), "at most 1024"),
    ("ignore_eos", 1, "true or false"),
    ("include_stop_str_in_output", None, "true or false"),
    ("skip_special_tokens", "yes", "true or false"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", 21, "from 0 to 20"),
    ("logprobs", True, "from 0 to 20"),
    ("prompt_logprobs", 21, "from 0 to 20"),
    ("presence_penalty", 2.5, "from -2 to 2"),
    ("frequency_penalty", -2.5, "from -2 to 2"),
    ("frequency_penalty", math.nan, "from -2 to 2"),
    ("repetition_penalty", 0, "above 0"),
    ("repetition_penalty", math.inf, "above 0"),
    ("logit_bias", [1, 2], "a map"),
    ("logit_bias", {"1": 1.0}, "integer from 0"),
    ("logit_bias", {-1: 1.0}, "integer from 0"),
    ("logit_bias", {1: 101}, "from -100 to 100"),
    ("logit_bias", {1: math.nan}, "from -100 to 100"),
    ("logit_bias", {1: None}, "from -100 to 100"),
    ("logit_bias", dict.fromkeys(range(1025), 1.0), "at most 1024"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_bad_values_are_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert allowed in message
    assert "\n" not in message
    assert len(message) < 300


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens is 5 but max_tokens is only 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_values_are_normalised() -> None:
    params = SamplingParams(
        stop="end",  # type: ignore[arg-type]
        stop_token_ids=[3, 4],  # type: ignore[arg-type]
        temperature=Fraction(1, 2),  # type: ignore[arg-type]
        top_k=-1,
        seed=-1,
        logit_bias={3: -100},
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.temperature == 0.5
    assert params.top_k == 0
    assert params.seed == 2**64 - 1
    assert params.logit_bias == {3: -100.0}
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_the_caller_keeps_its_map() -> None:
    bias = {1: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 2.0
    assert params.logit_bias == {1: 1.0}


def test_pickle_and_replace() -> None:
    params = SamplingParams(stop=("x",), logit_bias={1: 2.0}, seed=2**70 + 5, logprobs=0)
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=2).seed == 5
    with pytest.raises(InvalidRequestError):
        dataclasses.replace(params, n=0)


def test_ids_outside_the_vocabulary() -> None:
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=(9,)).check_vocab(10)
    with pytest.raises(InvalidRequestError, match=r"logit_bias names token 10.*0 to 9"):
        SamplingParams(logit_bias={10: 1.0}).check_vocab(10)
    with pytest.raises(InvalidRequestError, match="stop_token_ids names token 11"):
        SamplingParams(stop_token_ids=(11,)).check_vocab(10)


def test_greedy_is_any_temperature_too_small_to_matter() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy
