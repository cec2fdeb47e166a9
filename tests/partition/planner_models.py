"""Hand-made models and machines for the planner's tests."""

from __future__ import annotations

from kvcache.layout import KVLayerSpec
from kvcache.tier import TierBudget
from partition import Bandwidths, GemmRate, Link, ModelProfile, RuntimeRates
from partition.parallel_plan import EXPERT_PARAMETERS
from partition.profile import AttentionKind, Unit, UnitKind
from partition.sharding import Deal, HeadCounts, ParameterSpec, ShardRule

PAGE = 4096
RATES = Bandwidths(
    device_memory=16e9,
    host_to_device=8e9,
    device_to_host=8e9,
    disk_read=1e9,
    disk_write=1e9,
    gemm=(GemmRate(rows=1, flops_per_s=1e12), GemmRate(rows=64, flops_per_s=2e12)),
    runtime=RuntimeRates(layer_latency_s=1e-6, pass_latency_s=1e-6),
)
LINK = Link(bandwidth=1e9, latency_s=1e-6)


def budget(device: int, host: int = 0, nvme: int = 0) -> TierBudget:
    return TierBudget(device_bytes=device, host_bytes=host, nvme_bytes=nvme)


def _matrix(name: str, rows: int, columns: int, rule: ShardRule | None) -> ParameterSpec:
    return ParameterSpec(name=name, shape=(rows, columns), dtype_bytes=2, rule=rule)


def _experts(name: str, count: int, rows: int, columns: int, rule: ShardRule) -> ParameterSpec:
    return ParameterSpec(
        name=name, shape=(count, rows, columns), dtype_bytes=2, rule=rule, num_experts=count
    )


def llama_like(
    num_layers: int = 4,
    hidden: int = 64,
    inter: int = 128,
    vocab: int = 256,
    query: int = 8,
    key_value: int = 4,
    tied: bool = False,
    max_positions: int = 1024,
    mlp_sizes: tuple[int, ...] | None = None,
    num_experts: int = 0,
) -> ModelProfile:
    """A decoder of bf16 layers: attention q/k/v/o, an MLP of up and down, a norm, untied ends. With
    experts these share the MLP, and a token is routed to one of them."""
    head_dim = hidden // query
    units = [
        Unit(
            name="embedding",
            kind=UnitKind.EMBEDDING,
            layer=None,
            stage_end="first",
            parameters=(_matrix("embed", vocab, hidden, None),),
        )
    ]
    for i in range(num_layers):
        wide = mlp_sizes[i] if mlp_sizes else inter
        parts = {
            UnitKind.SMALL: (ParameterSpec(name=f"{i}.norm", shape=(hidden,), dtype_bytes=2),),
            UnitKind.ATTENTION: (
                _matrix(f"{i}.q", hidden, hidden, ShardRule(dim=0, deal=Deal.QUERY_HEADS)),
                _matrix(
                    f"{i}.kv",
                    key_value * head_dim,
                    hidden,
                    ShardRule(dim=0, deal=Deal.KEY_VALUE_HEADS),
                ),
                _matrix(f"{i}.o", hidden, hidden, ShardRule(dim=1, deal=Deal.QUERY_HEADS)),
            ),
            UnitKind.MLP: (
                _matrix(f"{i}.up", wide, hidden, ShardRule(dim=0)),
                _matrix(f"{i}.down", hidden, wide, ShardRule(dim=1)),
            )
            if not num_experts
            else (
                _matrix(f"{i}.router", num_experts, hidden, None),
                _experts(f"{i}.up", num_experts, wide // num_experts, hidden, ShardRule(dim=1)),
                _experts(f"{i}.down", num_experts, hidden, wide // num_experts, ShardRule(dim=2)),
            ),
        }
        units += [
            Unit(name=f"layers.{i}.{kind.value}", kind=kind, layer=i, parameters=parameters)
            for kind, parameters in parts.items()
        ]
    units.append(
        Unit(
            name="head",
            kind=UnitKind.HEAD,
            layer=None,
            stage_end="last",
            parameters=(_matrix("embed" if tied else "head", vocab, hidden, None),),
        )
    )
    return ModelProfile(
        architecture="LlamaLike",
        dtype="bfloat16",
        num_layers=num_layers,
        hidden_size=hidden,
        vocab_size=vocab,
        heads=HeadCounts(query=query, key_value=key_value),
        attention=AttentionKind.PAGED,
        units=tuple(units),
        styles={},
        kv_layers=tuple(
            KVLayerSpec(
                layer=i,
                key_heads=key_value,
                key_dim=head_dim,
                value_heads=key_value,
                value_dim=head_dim,
            )
            for i in range(num_layers)
        ),
        kv_sharded=True,
        max_position_embeddings=max_positions,
        num_experts=num_experts,
        num_experts_per_token=min(1, num_experts),
        expert_styles={
            f"{i}.{name}": EXPERT_PARAMETERS
            for i in range(num_layers)
            for name in ("up", "down")
            if num_experts
        },
    )
