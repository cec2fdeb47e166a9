"""Every parameter of saved models, whole and sliced, against transformers' own loading."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from giantserve.checkpoint import Checkpoint, SourceMap
from giantserve.errors import CheckpointError, UnsupportedModelError
from giantserve.safetensors_file import read_header

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {**SMALL, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "llama": SMALL,
    "gpt2": {**NO_TOKENS, "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        **NO_TOKENS,
        "vocab_size": 96,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "bloom": {**NO_TOKENS, "vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3_moe": {**MOE, "head_dim": 8, "num_experts": 4},
    "deepseek_v3": {
        **MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gemma3_text": {**SMALL, "head_dim": 8},
    "phi3": SMALL,
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "gpt_oss": {**SMALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_expand": 1,
    },
}


def build(model_type: str, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **MODELS[model_type], **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data.normal_()
    return model.eval()


def on_meta(path: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path), dtype=torch.float32
        )


def assert_same(source: SourceMap, model: PreTrainedModel) -> None:
    dice = random.Random(0)
    for name, value in model.state_dict().items():
        whole = torch.empty_like(value)
        source.fill(name, None, (), whole)
        assert torch.equal(whole, value), name
        for dim in range(value.ndim):
            cuts = sorted(dice.randrange(value.shape[dim] + 1) for _ in range(4))
            ranges = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
            expected = torch.cat([value.narrow(dim, a, b - a) for a, b in ranges], dim)
            part = torch.empty_like(expected)
            source.fill(name, dim, ranges, part)
            assert torch.equal(part, expected), (name, dim, ranges)


@pytest.mark.parametrize("shards", ["one file", "many files"])
@pytest.mark.parametrize("model_type", MODELS)
def test_every_parameter_is_found(model_type: str, shards: str, tmp_path: Path) -> None:
    model = build(model_type)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "many files" else "1GB")
    assert (tmp_path / "model.safetensors").exists() == (shards == "one file")
    assert_same(SourceMap(on_meta(tmp_path), Checkpoint(tmp_path)), model)


def test_experts_are_read_without_the_others(tmp_path: Path) -> None:
    """The merged experts come from slices: bytes of an expert not asked for may be missing."""
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    names = [name for name in checkpoint.tensors if ".experts.3.w1" in name]
    assert len(names) == 2, "saved in the published layout, one tensor an expert"
    source = SourceMap(on_meta(tmp_path), checkpoint)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    value = model.state_dict()[name]
    file = tmp_path / "model.safetensors"
    needed = [
        tensor.offset + 48 * 32 * 4
        for key, tensor in checkpoint.tensors.items()
        if "layers.1" in key and ("experts.0.w1" in key or "experts.0.w3" in key)
    ]
    os.truncate(file, max(needed))
    part = torch.empty(1, *value.shape[1:])
    source.fill(name, 0, [(0, 1)], part)
    assert torch.equal(part, value[:1])
    with pytest.raises(CheckpointError, match="too early"):
        source.fill(name, None, (), torch.empty_like(value))


def test_weights_saved_without_the_head_prefix(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    model.base_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    checkpoint = Checkpoint(tmp_path)
    assert "h.0.attn.c_attn.weight" in checkpoint.tensors
    assert_same(SourceMap(on_meta(tmp_path), checkpoint), model)


def test_tied_head_comes_from_the_embedding(tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert "lm_head.weight" not in checkpoint.tensors
    head = torch.empty(96, 32)
    SourceMap(on_meta(tmp_path), checkpoint).fill("lm_head.weight", None, (), head)
    assert torch.equal(head, model.model.embed_tokens.weight)


def test_values_are_converted_to_the_dtype_of_the_slice(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    value = model.model.layers[0].mlp.down_proj.weight
    part = torch.empty(32, 11, dtype=torch.bfloat16)
    source = SourceMap(on_meta(tmp_path), Checkpoint(tmp_path))
    source.fill("model.layers.0.mlp.down_proj.weight", 1, [(3, 14)], part)
    assert torch.equal(part, value[:, 3:14].to(torch.bfloat16))


def test_other_operations_run_on_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("giantserve.weight_conversion._RULES", {})
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    assert_same(SourceMap(on_meta(tmp_path), Checkpoint(tmp_path)), model)


def test_truncated_file_is_named_with_what_is_missing(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 17)
    with pytest.raises(CheckpointError, match=rf"{victim.name} is truncated: 17 of its") as caught:
        Checkpoint(tmp_path)
    assert caught.value.status_code == 400
    os.truncate(victim, 5)
    with pytest.raises(CheckpointError, match=victim.name):
        Checkpoint(tmp_path)
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name} is missing"):
        Checkpoint(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="convert"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="malformed"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"shape": [4]}}',
        b'{"a": 3}',
        b"[]",
    ],
)
def test_malformed_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        read_header(file)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    with torch.device("meta"):
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the model's"):
        SourceMap(other, Checkpoint(tmp_path))
    build("llama").save_pretrained(tmp_path)
    with torch.device("meta"):
        wider = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**SMALL, "vocab_size": 97})
        )
    with pytest.raises(CheckpointError, match="embed_tokens"):
        SourceMap(wider, Checkpoint(tmp_path))


def test_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = on_meta(tmp_path)
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UnsupportedModelError, match="mxfp4"):
        SourceMap(model, Checkpoint(tmp_path))


def test_fingerprint_follows_weights_and_config(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    first = Checkpoint(tmp_path).fingerprint
    assert Checkpoint(tmp_path).fingerprint == first
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    second = Checkpoint(tmp_path).fingerprint
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert len({first, second, Checkpoint(tmp_path).fingerprint}) == 3
