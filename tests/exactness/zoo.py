"""Tiny random models of many architectures, and what transformers generates with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tied random matrices mostly repeat their input
}
MOE: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "cohere": {},
    "olmo2": {},
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "deepseek_v3": {
        **MOE,
        "n_routed_experts": 4,
        "num_key_value_heads": 6,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "head_dim": None,
    },
    "gpt2": {"n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 512},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "bloom": {"n_layer": 4, "n_head": 6},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96},
    "mpt": {"d_model": 48, "n_heads": 6, "n_layers": 4, "max_seq_len": 512},
    "gptj": {"n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 512, "rotary_dim": 4},
    "gpt_oss": {**MOE, "sliding_window": 24},
    "starcoder2": {"sliding_window": 24},
    "granite": {},
    "stablelm": {},
    "phi": {"num_key_value_heads": 6},
    "cohere2": {"sliding_window": 24},
    "olmo": {},
    "olmo3": {"sliding_window": 24},
    "glm4": {},
    "gemma": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "olmoe": MOE,
    "glm4_moe": {**MOE, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4},
    "granitemoe_swa": {**MOE, "sliding_window": 24},
    "smollm3": {},
    "ernie4_5": {},
    "seed_oss": {},
    "gpt_bigcode": {
        "n_embd": 48,
        "n_layer": 4,
        "n_head": 6,
        "n_positions": 512,
        "multi_query": True,
    },
    "codegen": {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 4},
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 24,
    },
    "biogpt": {},
    "xglm": {"d_model": 48, "ffn_dim": 96, "num_layers": 4, "attention_heads": 6},
    "persimmon": {"num_key_value_heads": None},
    "diffllama": {"num_key_value_heads": 2},
    "minicpm3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 6,
        "head_dim": None,
    },
}
"""What each architecture needs beside COMMON to be tiny, and its features (windows, capping) to
bite."""


def make_config(name: str) -> Any:
    """The tiny fp32 config of an architecture."""
    options = {**COMMON, **OVERRIDES[name]}
    config_class = CONFIG_MAPPING[name.partition("-")[0]]
    renamed = set(getattr(config_class, "attribute_map", {}))
    fixed = {k for k in options if isinstance(getattr(config_class, k, None), property)}
    options = {k: v for k, v in options.items() if k not in renamed | fixed or k in OVERRIDES[name]}
    config = config_class(**options)
    config.dtype = torch.float32
    return config


def save_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the architecture's tiny model, its weights drawn from ``seed``; returns its folder."""
    path = folder / name
    if not (path / "config.json").exists():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(make_config(name))
        with torch.no_grad():  # vectors start as ones and zeros, which would hide a lost one
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(path)
    return path


def make_prompts(
    lengths: tuple[int, ...] = (3, 17, 40, 9, 1, 28, 33, 12), seed: int = 1
) -> list[list[int]]:
    """Random prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def reference(path: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """What ``transformers.generate`` continues each prompt with, greedily, one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


def save_twelve_layers(folder: Path, vocab_size: int = VOCAB) -> Path:
    """A Llama of 24 MiB, which takes a slow disk a while; fp32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "head_dim": 32}
    options = {**COMMON, **sizes, "vocab_size": vocab_size, "initializer_range": 0.05}
    config = transformers.LlamaConfig(**options)
    config.dtype = torch.float32
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
