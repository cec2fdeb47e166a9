"""Profiles of published giants, from their configs alone: exact numbers."""

from __future__ import annotations

import pytest
from transformers import (
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from partition import ModelProfile

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
GIANTS: dict[str, tuple[PretrainedConfig, int, int, int]] = {
    "Llama-3.1-405B": (
        LlamaConfig(
            **LLAMA,
            hidden_size=16384,
            intermediate_size=53248,
            num_hidden_layers=126,
            num_attention_heads=128,
        ),
        405_853_388_800,
        405_853_388_800,
        126 * 8 * 128 * 2 * 2,
    ),
    "Llama-3.1-70B": (
        LlamaConfig(
            **LLAMA,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
        ),
        70_553_706_496,
        70_553_706_496,
        80 * 8 * 128 * 2 * 2,
    ),
    "Mixtral-8x22B": (
        MixtralConfig(
            architectures=["MixtralForCausalLM"],
            dtype="bfloat16",
            vocab_size=32768,
            hidden_size=6144,
            intermediate_size=16384,
            num_hidden_layers=56,
            num_attention_heads=48,
            num_key_value_heads=8,
            max_position_embeddings=65536,
        ),
        140_630_071_296,
        140_630_071_296 - 56 * 6 * 3 * 6144 * 16384,
        56 * 8 * 128 * 2 * 2,
    ),
    "Qwen3-235B-A22B": (
        Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"],
            dtype="bfloat16",
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            tie_word_embeddings=False,
            max_position_embeddings=40960,
        ),
        235_093_634_560,
        235_093_634_560 - 94 * 120 * 3 * 4096 * 1536,
        94 * 4 * 128 * 2 * 2,
    ),
    "DeepSeek-V3": (
        DeepseekV3Config(
            architectures=["DeepseekV3ForCausalLM"],
            dtype="bfloat16",
            max_position_embeddings=131072,
        ),
        671_026_404_352,
        671_026_404_352 - 58 * 248 * 3 * 7168 * 2048,
        61 * (512 + 64) * 2,
    ),
}
"""By name: the config, all parameters, those active for a token, bytes of KV a token."""


@pytest.mark.parametrize("name", GIANTS)
def test_numbers_are_those_of_the_model(name: str) -> None:
    config, parameters, active, kv_bytes = GIANTS[name]
    profile = ModelProfile.from_config(config)
    assert profile.num_parameters == parameters
    assert profile.num_active_parameters == active
    # DeepSeek's routers keep a bias for each expert in float32
    routers = 58 * 256 * 2 if name == "DeepSeek-V3" else 0
    assert profile.num_bytes == 2 * parameters + routers
    assert profile.kv_layout(0, profile.num_layers, 16).bytes_per_token == kv_bytes
    assert (
        sum(spec.num_elements for unit in profile.units for spec in unit.parameters) >= parameters
    )
