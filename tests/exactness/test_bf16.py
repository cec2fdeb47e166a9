"""In bf16, too, the tokens are those of transformers' generate, where attention is asked to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from zoo import COMMON

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from kvcache.tier import Tier

NUM_TOKENS = 24
LENGTHS = (64, 41)
PER_LENGTH = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four query heads a KV head, and a spread of weights that leaves near ties."""
    folder = tmp_path_factory.mktemp("bf16")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    config = transformers.LlamaConfig(**{**COMMON, **sizes})
    config.dtype = torch.bfloat16
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("memory", [{}, {"device_memory": "6MiB", "host_memory": "2MiB"}])
def test_exact_attention_gives_the_tokens_of_transformers(
    path: Path, memory: dict[str, str], launcher: Launcher
) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 4096, (PER_LENGTH, n), generator=generator) for n in LENGTHS]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    expected = [
        row[prompt.shape[1] :].tolist()
        for prompt in prompts
        for row in model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
    ]
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    options = {**memory, "nvme_dir": path / "nvme"} if memory else {}
    with LLM(path, max_model_len=96, exact_attention=True, launcher=launcher, **options) as llm:
        (shard,) = llm.plan.shards
        assert (shard.weight_bytes(Tier.NVME) > 0) == bool(memory)
        outputs = llm.generate([row.tolist() for each in prompts for row in each], greedy)
    assert [output.token_ids for output in outputs] == expected
