"""What cannot be is refused with a typed error, and the engine serves on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from giantserve import LLM, SamplingParams
from giantserve.errors import ConfigError, InvalidRequestError
from partition.errors import PlanError

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture(autouse=True)
def still_serves(llm: LLM) -> Any:
    before = llm.generate([5, 6, 7], GREEDY)[0].token_ids
    yield
    assert llm.generate([5, 6, 7], GREEDY)[0].token_ids == before
    stats = llm.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["kv"]["device_blocks_free"] == stats["kv"]["device_blocks"]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([[]], GREEDY, "empty"),
        ([5] * 256, GREEDY, "256"),
        ([5] * 5000, GREEDY, "5000"),
        ([5, 400], GREEDY, "token id 400 is outside the vocabulary of 400"),
        ([5, -1], GREEDY, "token id -1"),
        ([5], SamplingParams(logit_bias={400: 1.0}), "400"),
        ([5], SamplingParams(stop_token_ids=(1000,)), "1000"),
        ("text \ud800", GREEDY, "surrogate"),
    ],
)
def test_prompts_and_ids(llm: LLM, prompt: Any, params: SamplingParams, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompt, params)


def test_one_bad_prompt_refuses_the_call_before_anything_runs(llm: LLM) -> None:
    before = llm.stats()["requests"]
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        llm.generate([[5, 6], [7, 4000], [8]], GREEDY)
    assert llm.stats()["requests"] == before


@pytest.mark.parametrize("prompt", [[5, 1.5], [5, "a"], [[5, None]], 7, None, [3.5]])
def test_prompts_of_a_wrong_type(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate(prompt, GREEDY)


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 sampling params for 3 prompts"):
        llm.generate([[5], [6], [7]], [GREEDY, GREEDY])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "-1"),
        ({"max_tokens": 0}, "0"),
        ({"temperature": -0.5}, "-0.5"),
        ({"temperature": float("nan")}, "nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"n": 0}, "n must"),
        ({"logprobs": 21}, "21"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ],
)
def test_sampling_params(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devce_memory": "1GiB"}, "devce_memory"),
        ({"device_memory": "lots"}, "lots"),
        ({"device_memory": -5}, "-5"),
        ({"device_memory": 1.5}, "1.5"),
        ({"executor": "slurm"}, "slurm"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "int3"}, "int3"),
        ({"tensor_parallel": 0}, "0"),
        ({"tensor_parallel": -2}, "-2"),
        ({"pipeline_parallel": 50}, "50"),
        ({"block_size": 0}, "0"),
        ({"max_model_len": 0}, "0"),
        ({"max_num_seqs": -3}, "-3"),
        ({"threads_per_shard": 0}, "0"),
        ({"max_queued_requests": 0}, "0"),
        ({"tenant_prefix_share": 1.5}, "tenant_prefix_share is 1.5"),
        ({"kv_storage_dtype": "int4"}, "there are auto, int8, fp8"),
        ({"max_model_len": 10**9}, "1000000000"),
    ],
)
def test_options(
    model_path: Path, options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, PlanError), match=message):
        LLM(model_path, **{**options, **given}).close()


def test_chat_needs_messages_that_the_template_takes(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="unknown role robot"):
        llm.chat([{"role": "robot", "content": "hello"}])
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.chat([])
