"""What the planner knows of a model: units, parameters, KV per token. From a config, without
weights."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcache.layout import KVLayerSpec, KVLayout
from partition.routing import WHOLE_SHARE, distinct_experts
from partition.sharding import HeadCounts, ParameterSpec, ShardRule, deal_ranges


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
    """The smallest group of weights that moves together.

    ``layer`` is None for what stands before and after the layers; ``stage_end`` then says on which
    stage: "first" or "last".
    """

    name: str
    kind: UnitKind
    layer: int | None
    parameters: tuple[ParameterSpec, ...]
    stage_end: str | None = None

    def num_bytes(self, heads: HeadCounts, rank: int = 0, world: int = 1) -> int:
        """Bytes of the slice that one tensor-parallel rank holds, as it lies on a tier: tensors on
        multiples of 64 bytes, the unit a multiple of 4096."""
        sizes = (spec.local_bytes(heads, rank, world) for spec in self.parameters)
        return _round_up(sum(_round_up(size, 64) for size in sizes), 4096)

    @property
    def num_parameters(self) -> int:
        return sum(spec.num_elements for spec in self.parameters)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """A model as the planner sees it.

    ``units`` stand in the order a pass uses them: embedding, input, the layers' small, attention
    and mlp units, output, head. With tied embeddings the head's unit lists the embedding's
    parameter again; `stage_units` counts it once. ``styles`` maps module paths to tensor-parallel
    styles ("colwise", "rowwise", ...), ``expert_styles`` those of the experts to the styles that
    take their place under expert parallelism. ``expert_parallel``: the rules and styles are those
    of `expert_parallel_variant`. ``kv_layers`` are per token and unsharded; ``kv_sharded``
    says whether tensor parallelism deals the KV heads out or replicates them. ``layer_outputs``:
    how many values a layer module returns as a tuple, 0 for a bare tensor.
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
    expert_styles: dict[str, str] = field(default_factory=dict)
    expert_parallel: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 0
    layer_outputs: int = 0

    @classmethod
    def from_config(cls, config: Any, dtype: str | None = None) -> ModelProfile:
        """Profile a transformers config (built on the meta device; no weights are read or
        allocated).

        ``dtype`` overrides the config's. Raises UnsupportedArchitectureError with the reason where
        the model cannot run.
        """
        from partition.profiling import profile_config

        return profile_config(config, dtype)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: str = "auto", trust_remote_code: bool = False
    ) -> ModelProfile:
        """Profile the checkpoint folder ``path`` from its ``config.json``."""
        from partition.profiling import load_config

        return cls.from_config(load_config(path, dtype, trust_remote_code))

    @cached_property
    def _parameters(self) -> dict[str, ParameterSpec]:
        return {spec.name: spec for unit in self.units for spec in unit.parameters}

    @cached_property
    def num_parameters(self) -> int:
        """Exact count of distinct parameters (tied ones once)."""
        return sum(spec.num_elements for spec in self._parameters.values() if not spec.is_buffer)

    @cached_property
    def num_active_parameters(self) -> int:
        """Parameters that one token's pass uses: only the routed experts of a mixture of
        experts."""
        if not self.num_experts:
            return self.num_parameters
        share = self.num_experts_per_token / self.num_experts
        experts = sum(
            spec.num_elements for spec in self._parameters.values() if spec.num_experts > 1
        )
        return self.num_parameters - experts + round(experts * share)

    def expert_share(self, num_tokens: int) -> float:
        """The expected share of a layer's experts that some token of a pass is routed to."""
        if self.num_experts < 2:
            return 1.0
        distinct = distinct_experts(self.num_experts, self.num_experts_per_token, num_tokens)
        return distinct / self.num_experts

    def reads_whole_experts(self, num_tokens: int) -> bool:
        """Whether a pass reads all experts of a layer ahead, needed or not."""
        return self.expert_share(num_tokens) > WHOLE_SHARE

    def streamed_expert_share(self, num_tokens: int) -> float:
        """The share of a layer's routed experts that a pass reads where they do not stay."""
        return 1.0 if self.reads_whole_experts(num_tokens) else self.expert_share(num_tokens)

    def is_routed(self, spec: ParameterSpec) -> bool:
        """Whether the parameter is the experts', of which a pass reads those that it routes to."""
        return spec.num_experts > 1 and spec.name in self.expert_styles

    @cached_property
    def num_bytes(self) -> int:
        return sum(spec.num_elements * spec.dtype_bytes for spec in self._parameters.values())

    def why_not_tensor_parallel(self, world: int) -> str | None:
        """Why the model cannot be split ``world`` ways within a layer; None where it can."""
        if world == 1:
            return None
        if self.tensor_parallel_refusal:
            return self.tensor_parallel_refusal
        if self.kv_sharded and world > self.heads.query:
            return f"{world} ranks for {self.heads.query} attention heads"
        for (rule, size), name in self._dealt_dimensions.items():
            try:
                portions = [
                    deal_ranges(rule, size, self.heads, rank, world) for rank in range(world)
                ]
            except ValueError as error:
                return f"{name}: {error}"
            if any(start == stop for ranges in portions for start, stop in ranges):
                return f"{name}: {size} elements do not reach {world} ranks"
        return None

    @cached_property
    def _dealt_dimensions(self) -> dict[tuple[ShardRule, int], str]:
        """Every distinct (rule, size of the dimension it deals), and a parameter that has it."""
        found: dict[tuple[ShardRule, int], str] = {}
        for spec in self._parameters.values():
            if spec.rule is not None:
                found.setdefault((spec.rule, spec.shape[spec.rule.dim]), spec.name)
        return found

    def why_not_expert_parallel(self, world: int) -> str | None:
        """Why ``world`` tensor-parallel ranks cannot deal out whole experts; None where they
        can."""
        if not self.expert_styles:
            if self.num_experts > 1:
                return f"{self.architecture} has no plan for dealing out its experts"
            return f"{self.architecture} has no experts"
        if world == 1:
            return "a single tensor-parallel rank holds all experts"
        return self.expert_parallel_variant.why_not_tensor_parallel(world)

    @cached_property
    def expert_parallel_variant(self) -> ModelProfile:
        """The same model with its experts dealt out whole over the ranks of a tensor-parallel
        group, instead of each expert being cut; everything else is split as it was."""

        def dealt(spec: ParameterSpec) -> ParameterSpec:
            return replace(spec, rule=ShardRule(dim=0)) if spec.name in self.expert_styles else spec

        return replace(
            self,
            units=tuple(
                replace(unit, parameters=tuple(map(dealt, unit.parameters))) for unit in self.units
            ),
            styles=self.styles | self.expert_styles,
            expert_parallel=True,
        )

    def stage_units(self, first_layer: int, end_layer: int) -> tuple[Unit, ...]:
        """The units of a stage holding layers [first_layer, end_layer), in pass order.

        With tied embeddings a stage that holds both ends keeps the matrix once, in the head's unit.
        """
        first, last = first_layer == 0, end_layer == self.num_layers
        held = [
            unit
            for unit in self.units
            if (unit.layer is not None and first_layer <= unit.layer < end_layer)
            or (unit.stage_end == "first" and first)
            or (unit.stage_end == "last" and last)
        ]
        seen: set[str] = set()
        units: list[Unit] = []
        for unit in reversed(held):
            kept = tuple(spec for spec in unit.parameters if spec.name not in seen)
            seen.update(spec.name for spec in kept)
            if kept:
                units.append(replace(unit, parameters=kept))
        return tuple(reversed(units))

    @cached_property
    def kv_layer_kinds(self) -> tuple[KVLayerSpec, ...]:
        """One layer of each that caches something else."""
        kinds = {replace(spec, layer=0): spec for spec in self.kv_layers}
        return tuple(kinds.values())

    def kv_layout(
        self,
        first_layer: int,
        end_layer: int,
        block_size: int,
        rank: int = 0,
        world: int = 1,
        storage_dtype: str = "auto",
    ) -> KVLayout:
        """How a KV block lies on one shard of a stage."""
        layers = self.kv_layers[first_layer:end_layer]
        if self.kv_sharded and world > 1:
            start, stop = self.heads.key_value_range(rank, world)
            layers = tuple(
                replace(spec, key_heads=stop - start, value_heads=stop - start) for spec in layers
            )
        return KVLayout(
            layers=layers, block_size=block_size, dtype=self.dtype, storage_dtype=storage_dtype
        )
