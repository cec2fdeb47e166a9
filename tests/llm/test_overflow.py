"""A request whose logits are not finite fails by itself."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from giantserve import SamplingParams
from giantserve.config import EngineConfig
from giantserve.engine import Engine
from giantserve.errors import GiantserveError, OverflowedError
from giantserve.outputs import StreamDelta
from tests.exactness.zoo import reference, save_model

OVERFLOWING_TOKEN = 7
NUM_TOKENS = 8


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which one token's hidden states are not numbers."""
    path = save_model("llama", tmp_path_factory.mktemp("overflow"))
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][OVERFLOWING_TOKEN] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    return path


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_fails_and_those_of_the_same_passes_do_not(
    path: Path, dtype: str, temperature: float
) -> None:
    overflowing = [OVERFLOWING_TOKEN, *range(20, 60)]
    prompts = [[3, 14, 15, 92], overflowing, [89, 79, 32, 38, 46, 26, 43]]
    answers = [run(path, dtype, temperature, prompts) for prompts in (prompts, prompts[::2])]
    assert isinstance(answers[0][1], OverflowedError)
    assert dtype in str(answers[0][1])
    others = [answers[0][0], answers[0][2]]
    if dtype == "float32":  # in bf16 the rows of a product show in its last bit
        assert others == answers[1]
    assert [len(tokens) for tokens in others] == [NUM_TOKENS, NUM_TOKENS]  # type: ignore[arg-type]


def run(
    path: Path, dtype: str, temperature: float, prompts: list[list[int]]
) -> list[list[int] | GiantserveError]:
    """Each prompt's tokens, or its error; all run together."""
    params = SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=temperature,
        seed=5,
        ignore_eos=True,
        logit_bias={OVERFLOWING_TOKEN: -100.0},
    )
    engine = Engine(EngineConfig(model=str(path), dtype=dtype, max_model_len=64))
    try:
        sinks: list[queue.SimpleQueue[StreamDelta | GiantserveError]] = []
        with engine.together():
            for number, prompt in enumerate(prompts):
                sinks.append(queue.SimpleQueue())
                engine.submit(str(number), prompt, params, sinks[-1].put)
        answers = [answer(sink) for sink in sinks]
        stats = engine.stats()
        assert stats["running"] == 0
        assert stats["kv"]["device_blocks_cached"] == 0, "what is no number can be matched"
        return answers
    finally:
        engine.close()


def answer(sink: queue.SimpleQueue[StreamDelta | GiantserveError]) -> list[int] | GiantserveError:
    tokens: list[int] = []
    while not isinstance(item := sink.get(timeout=120), GiantserveError):
        tokens += item.token_ids
        if item.usage is not None:
            return tokens
    return item


def test_the_control_answers_as_transformers_does(path: Path) -> None:
    prompt = [3, 14, 15, 92]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    engine = Engine(EngineConfig(model=str(path), max_model_len=64))
    sink: queue.SimpleQueue[StreamDelta | GiantserveError] = queue.SimpleQueue()
    try:
        engine.submit("well", prompt, params, sink.put)
        assert [answer(sink)] == reference(path, [prompt], NUM_TOKENS)
    finally:
        engine.close()
