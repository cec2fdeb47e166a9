"""Profile a model: group its parameters into units and give each its shard rule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from kvcache.layout import DTYPE_BYTES, KVLayerSpec
from partition.errors import UnsupportedArchitectureError
from partition.meta_model import Observation, trace
from partition.parallel_plan import (
    SPLIT_STYLES,
    expert_parallel_styles,
    tensor_parallel_styles,
)
from partition.profile import AttentionKind, ModelProfile, Unit, UnitKind
from partition.sharding import Deal, HeadCounts, ParameterSpec, ShardRule

_KEY_VALUE_PROJECTION = re.compile(r"(k|v|kv|keys?|values?)(_[a-z_]*)?")


def load_config(path: str | Path, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder, its dtype set to ``dtype`` unless that is
    "auto"."""
    if not (Path(path) / "config.json").is_file():
        raise UnsupportedArchitectureError(f"{path} is not a model folder: it holds no config.json")
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers validates in many ways
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedArchitectureError(
            f"{path}/config.json cannot be used: {reason}; restore the file"
        ) from error
    if dtype != "auto":
        config.dtype = _torch_dtype(dtype)
    return config


def _torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPE_BYTES:
        raise UnsupportedArchitectureError(
            f"dtype {name} is not one of {', '.join(DTYPE_BYTES)}; pass one of these as dtype"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def profile_config(config: Any, dtype: str | None) -> ModelProfile:
    """See `ModelProfile.from_config`."""
    if dtype is not None:
        config = type(config).from_dict(config.to_dict())
        config.dtype = _torch_dtype(dtype)
    name = str(config.dtype or torch.float32).removeprefix("torch.")
    _torch_dtype(name)
    model, seen = trace(config)
    kind = _attention_kind(seen)
    styles, refusal = tensor_parallel_styles(model, seen.layers_path)
    heads, heads_refusal = _head_counts(config, seen, kind)
    builder = _ParameterSpecs(model, config, styles, tuple(seen.attention_modules.values()))
    splits_attention = any(
        builder.in_attention(path) and style == "colwise" for path, style in styles.items()
    )
    if kind is AttentionKind.GENERIC:
        heads_refusal = f"{type(model).__name__}'s attention takes no replacement"
    elif kind is AttentionKind.LATENT and splits_attention:
        heads_refusal = f"{type(model).__name__} does not attend to what it caches"
    return ModelProfile(
        architecture=type(model).__name__,
        dtype=name,
        num_layers=len(seen.cached),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        heads=heads,
        attention=kind,
        units=tuple(_units(model, seen, builder)),
        styles=styles,
        expert_styles=expert_parallel_styles(model),
        kv_layers=tuple(_kv_layer(layer, *seen.cached[layer]) for layer in sorted(seen.cached)),
        kv_sharded=splits_attention and kind is AttentionKind.PAGED,
        max_position_embeddings=_max_positions(config),
        tensor_parallel_refusal=refusal or heads_refusal,
        layer_outputs=seen.layer_outputs,
        num_experts=builder.num_experts,
        num_experts_per_token=int(
            _first(config, "num_experts_per_tok", "moe_topk", "top_k", default=0)
        ),
    )


def _attention_kind(seen: Observation) -> AttentionKind:
    if not seen.attention_modules:
        return AttentionKind.GENERIC
    if set(seen.attention_modules) != set(seen.cached):
        raise UnsupportedArchitectureError("layers that attend and layers that cache differ")
    return AttentionKind.PAGED if seen.attends_cached else AttentionKind.LATENT


def _kv_layer(layer: int, key: torch.Size, value: torch.Size) -> KVLayerSpec:
    return KVLayerSpec(
        layer=layer,
        key_heads=key[1],
        key_dim=key[-1],
        value_heads=value[1],
        value_dim=value[-1],
    )


def _head_counts(
    config: Any, seen: Observation, kind: AttentionKind
) -> tuple[HeadCounts, str | None]:
    query = int(_first(config, "num_attention_heads", "n_head", "n_heads", default=1))
    if kind is not AttentionKind.PAGED:
        return HeadCounts(query=query, key_value=query), None
    counts = {key[1] for key, _ in seen.cached.values()}
    key_value = max(counts)
    if query % key_value:
        return HeadCounts(query=query, key_value=query), "query heads do not group by KV heads"
    refusal = "its layers differ in their number of KV heads" if len(counts) > 1 else None
    return HeadCounts(query=query, key_value=key_value), refusal


def _max_positions(config: Any) -> int:
    """The longest context that behaves the same for every sequence of a batch.

    Rotary schemes that look at the longest sequence ("dynamic", "longrope") change what every other
    one computes past the original length, so the original length is the limit.
    """
    limit = int(
        _first(
            config,
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "seq_length",
            default=2048,
        )
    )
    limit = min(limit, int(getattr(config, "attention_chunk_size", None) or limit))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def _first(config: Any, *names: str, default: int) -> Any:
    return next((v for v in (getattr(config, n, None) for n in names) if v is not None), default)


class _ParameterSpecs:
    """Gives each parameter its spec: shape, bytes, and the shard rule that its module's style
    implies."""

    def __init__(
        self, model: nn.Module, config: Any, styles: dict[str, str], attention: tuple[str, ...]
    ) -> None:
        self._styles = styles
        self._attention = attention
        self._num_heads = int(_first(config, "num_attention_heads", "n_head", "n_heads", default=1))
        self.num_experts = int(
            _first(config, "num_local_experts", "num_experts", "n_routed_experts", default=0)
        )
        self._buffers = {name for name, _ in model.named_buffers()}
        self._ends = {
            model.get_parameter(f"{name}.weight")
            for name, module in model.named_modules()
            if module in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        }

    def in_attention(self, path: str) -> bool:
        return any(path.startswith(f"{module}.") for module in self._attention)

    def of(self, name: str, tensor: torch.Tensor) -> ParameterSpec:
        experts = tensor.dim() >= 2 and self.num_experts > 1 and tensor.shape[0] == self.num_experts
        owned_by_experts = experts and self._styles.get(name.rpartition(".")[0]) is None
        return ParameterSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype_bytes=tensor.element_size(),
            rule=self._rule(name, tensor),
            num_experts=self.num_experts
            if experts and (tensor.dim() == 3 or (owned_by_experts and "experts" in name))
            else 1,
            is_buffer=name in self._buffers,
        )

    def _rule(self, name: str, tensor: torch.Tensor) -> ShardRule | None:
        module, _, leaf = name.rpartition(".")
        if any(tensor is end for end in self._ends) and self._styles:
            return ShardRule(dim=0)
        if (
            module in self._attention
            and tensor.shape[:1] == (self._num_heads,)
            and any(self.in_attention(path) and s == "colwise" for path, s in self._styles.items())
        ):
            return ShardRule(dim=0, deal=Deal.QUERY_HEADS)  # a value per head, such as a sink
        if (own := self._styles.get(name)) is not None:
            return self._parameter_rule(own, tensor)
        style = self._styles.get(module)
        if style in ("colwise", "colwise_gather_output"):
            return ShardRule(dim=0, deal=self._deal(module, style))
        if style in ("rowwise", "rowwise_split_input"):
            if leaf != "weight":
                return None
            return ShardRule(dim=1, deal=self._deal(module, style))
        if style == "packed_colwise":
            return ShardRule(dim=0, segments=2)
        return None

    def _parameter_rule(self, style: str, tensor: torch.Tensor) -> ShardRule | None:
        """Styles given to a bare parameter: experts' weights, [experts, out, in] and [experts,
        out]."""
        if style == "packed_colwise":
            return ShardRule(dim=1, segments=2)
        if style == "colwise":
            return ShardRule(dim=1 if tensor.dim() == 3 else 0)
        if style == "rowwise" and tensor.dim() == 3:
            return ShardRule(dim=2)
        return None

    def _deal(self, module: str, style: str) -> Deal:
        if style not in SPLIT_STYLES or not self.in_attention(module):
            return Deal.EVEN
        if _KEY_VALUE_PROJECTION.fullmatch(module.rpartition(".")[2]):
            return Deal.KEY_VALUE_HEADS
        return Deal.QUERY_HEADS


def _units(model: nn.Module, seen: Observation, specs: _ParameterSpecs) -> list[Unit]:
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: model.get_buffer(name) for name in _persistent_buffers(model)}
    embedding = _path_of(model, model.get_input_embeddings())  # type: ignore[operator]
    head = _path_of(model, model.get_output_embeddings())  # type: ignore[operator]
    tied = bool(embedding and head) and (
        tensors[f"{embedding}.weight"] is tensors[f"{head}.weight"]
    )
    groups: dict[str, list[ParameterSpec]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{seen.layers_path}."):
            group = _layer_group(name, seen, tensors)
        elif name.startswith(f"{embedding}."):
            group = "embedding"
        elif head and name.startswith(f"{head}."):
            group = "head"
            if tied and name == f"{head}.weight":
                name, tensor = f"{embedding}.weight", tensors[f"{embedding}.weight"]
        else:
            group = "output" if name.rpartition(".")[0] in seen.after else "input"
        groups.setdefault(group, []).append(specs.of(name, tensor))
    kinds = {
        "small": UnitKind.SMALL,
        "attention": UnitKind.ATTENTION,
        "mlp": UnitKind.MLP,
    }
    units = []
    if "embedding" in groups:
        units.append(_end("embedding", UnitKind.EMBEDDING, groups, "first"))
    if "input" in groups:
        units.append(_end("input", UnitKind.SMALL, groups, "first"))
    for layer in range(len(seen.cached)):
        for part, kind in kinds.items():
            if parameters := groups.get(f"layers.{layer}.{part}"):
                units.append(
                    Unit(
                        name=f"layers.{layer}.{part}",
                        kind=kind,
                        layer=layer,
                        parameters=tuple(parameters),
                    )
                )
    if "output" in groups:
        units.append(_end("output", UnitKind.SMALL, groups, "last"))
    if "head" in groups:
        units.append(_end("head", UnitKind.HEAD, groups, "last"))
    return units


def _end(name: str, kind: UnitKind, groups: dict[str, list[ParameterSpec]], end: str) -> Unit:
    return Unit(name=name, kind=kind, layer=None, parameters=tuple(groups[name]), stage_end=end)


def _layer_group(name: str, seen: Observation, tensors: dict[str, torch.Tensor]) -> str:
    """layers.<i>.<part>: a layer's child that attends, one that only holds vectors, or the rest."""
    layer, child, *_ = name.removeprefix(f"{seen.layers_path}.").split(".")
    prefix = f"{seen.layers_path}.{layer}.{child}"
    attends = seen.attention_modules.get(int(layer), "").startswith(prefix) or (
        int(layer) not in seen.attention_modules and "att" in child
    )
    vectors = all(
        tensor.dim() < 2
        for other, tensor in tensors.items()
        if other == prefix or other.startswith(f"{prefix}.")
    )
    part = "small" if vectors else "attention" if attends else "mlp"
    return f"layers.{layer}.{part}"


def _persistent_buffers(model: nn.Module) -> list[str]:
    state = model.state_dict(keep_vars=True)
    return [name for name, _ in model.named_buffers() if name in state]


def _path_of(model: nn.Module, target: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is target), None)
