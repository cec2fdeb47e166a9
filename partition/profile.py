"""What the planner knows of a model: units, parameters, KV per token. From a config, without weights."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcache.layout import DTYPE_BYTES, KVLayerSpec, KVLayout
from partition.sharding import HeadCounts, ParameterSpec


class UnitKind(enum.Enum):
    """What a unit is, which decides how the shards reach it."""

    EMBEDDING = "embedding"  # only the rows of the pass's tokens are read, from whatever tier
    ATTENTION = "attention"
    MLP = "mlp"
    SMALL = "small"  # norms and other vectors: always on the device
    HEAD = "head"


class AttentionKind(enum.Enum):
    """How the architecture lets us at its keys and values."""

    PAGED = "paged"  # a registered attention function sees what is cached
    LATENT = "latent"  # the cache holds a compressed form (MLA), expanded before attention
    GENERIC = "generic"  # no attention function: a cache object, one sequence at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The smallest group of weights that moves together. ``layer`` is None for embedding and head."""

    name: str
    kind: UnitKind
    layer: int | None
    parameters: tuple[ParameterSpec, ...]

    def num_bytes(self, heads: HeadCounts, rank: int = 0, world: int = 1) -> int:
        """Bytes of the slice that one tensor-parallel rank holds."""
        return sum(spec.local_bytes(heads, rank, world) for spec in self.parameters)

    @property
    def num_parameters(self) -> int:
        return sum(spec.num_elements for spec in self.parameters)


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """A model as the planner sees it.

    ``units`` stand in the order a pass uses them: embedding, the layers' small, attention and mlp units,
    head. With tied embeddings the head's unit lists the embedding's parameter again; `stage_units` counts
    it once. ``styles`` maps module paths to tensor-parallel styles ("colwise", "rowwise", ...).
    ``kv_layers`` are per token and unsharded; ``kv_sharded`` says whether tensor parallelism deals the KV
    heads out or replicates them.
    """

    architecture: str
    dtype: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    heads: HeadCounts
    attention: AttentionKind
    units: tuple[Unit, ...]
    styles: dict[str, str]
    kv_layers: tuple[KVLayerSpec, ...]
    kv_sharded: bool
    max_position_embeddings: int
    tensor_parallel_refusal: str | None = None
    num_experts: int = 0
    num_experts_per_token: int = 0

    @classmethod
    def from_config(cls, config: Any, dtype: str | None = None) -> ModelProfile:
        """Profile a transformers config (built on the meta device; no weights are read or allocated).

        Raises UnsupportedArchitecture with the reason where the model cannot run.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: str = "auto", trust_remote_code: bool = False
    ) -> ModelProfile:
        """Profile the checkpoint folder ``path`` from its ``config.json``."""
        raise NotImplementedError

    @cached_property
    def num_parameters(self) -> int:
        """Exact count of distinct parameters (tied ones once)."""
        return sum({s.name: s.num_elements for u in self.units for s in u.parameters}.values())

    @cached_property
    def num_active_parameters(self) -> int:
        """Parameters that one token's pass uses: only the routed experts of a mixture of experts."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * DTYPE_BYTES[self.dtype]

    def why_not_tensor_parallel(self, world: int) -> str | None:
        """Why the model cannot be split ``world`` ways within a layer; None where it can."""
        raise NotImplementedError

    def stage_units(self, first_layer: int, end_layer: int) -> tuple[Unit, ...]:
        """The units of a stage holding layers [first_layer, end_layer), tied embeddings once, in pass order."""
        raise NotImplementedError

    def kv_layout(
        self, first_layer: int, end_layer: int, block_size: int, rank: int = 0, world: int = 1
    ) -> KVLayout:
        """How a KV block lies on one shard of a stage."""
        raise NotImplementedError
