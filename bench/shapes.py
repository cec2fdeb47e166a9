"""Model shapes that benchmarks use, written as random-weight checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2.2gb": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-14.5gb": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    "llama-tiny-fp32": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "dtype": "float32",
    },
    "llama-0.2gb": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-0.2gb-mha": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
    },
    "llama-0.5gb": {
        "vocab_size": 16000,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 9,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
    "llama-0.7gb-deep": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-0.8gb": {
        "vocab_size": 8192,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}


def write_checkpoint(shape: str, folder: Path) -> Path:
    """The checkpoint of a shape (bf16, if it says nothing else) below ``folder``, one file a layer;
    written once. Tiny ones get larger weights, so that their tokens vary."""
    from transformers import LlamaConfig

    path = folder / shape
    if (path / "config.json").exists():
        return path
    unfinished = folder / f"{shape}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    values = {"dtype": "bfloat16", **SHAPES[shape]}
    config = LlamaConfig(**values, architectures=["LlamaForCausalLM"])
    dtype = getattr(torch, values["dtype"])
    scale = 0.02 if values["hidden_size"] > 512 else 0.2
    files: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for index, group in enumerate(_tensors(config)):
        name = f"model-{index:05d}.safetensors"
        tensors = {
            key: torch.ones(size, dtype=dtype)
            if len(size) == 1
            else torch.randn(size, generator=generator).mul_(scale).to(dtype)
            for key, size in group.items()
        }
        save_file(tensors, unfinished / name, metadata={"format": "pt"})
        files |= dict.fromkeys(group, name)
    _write_index(unfinished, files)
    config.save_pretrained(unfinished)
    unfinished.rename(path)
    return path


def _tensors(config: Any) -> list[dict[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = hidden // config.num_attention_heads
    keys = config.num_key_value_heads * head_dim
    groups: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (config.vocab_size, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (config.vocab_size, hidden),
        }
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        groups.append(
            {
                f"{prefix}.input_layernorm.weight": (hidden,),
                f"{prefix}.post_attention_layernorm.weight": (hidden,),
                f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
                f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
                f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
                f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
                f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
                f"{prefix}.mlp.up_proj.weight": (inner, hidden),
                f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            }
        )
    return groups


def _write_index(folder: Path, files: dict[str, str]) -> None:
    import json

    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
