"""Writes a large random Llama checkpoint, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch

HIDDEN, INNER, LAYERS, HEADS, VOCAB = 2048, 5632, 16, 16, 8192


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        for name in "qkvo":
            found[f"{start}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{start}.mlp.gate_proj.weight"] = (INNER, HIDDEN)
        found[f"{start}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        found[f"{start}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found[f"{start}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{start}.post_attention_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_big_llama(folder: Path) -> int:
    """Write config and weights (bf16) into ``folder``; returns the bytes of the weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes().items():
        size = 2 * torch.Size(shape).numel()
        offsets = [offset, offset + size]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        offset += size
    text = json.dumps(header).encode()
    noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    data = noise.view(torch.uint8).numpy().data
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place, shape in enumerate(shapes().values()):
            left, start = 2 * torch.Size(shape).numel(), 2 * 4099 * place
            while left:
                part = data[start : start + left]
                file.write(part)
                left, start = left - len(part), 0
    return offset
