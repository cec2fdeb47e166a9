"""What every possible stage of a model holds, for one tensor-parallel degree: all ranges of layers
at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from kvcache.layout import DTYPE_BYTES, KVLayerSpec
from partition.cost import PAGE_BYTES, Load, page_rounded, unit_row
from partition.profile import ModelProfile, Unit, UnitKind
from partition.sharding import ParameterSpec
from partition.tier_choice import RING_DEPTHS, UnitClass, ring_bytes

TENSOR_ALIGNMENT = 64
"""Within a unit each tensor starts at a multiple of this many bytes."""


LayerKind = tuple[tuple[Unit, ...], KVLayerSpec]
"""The units of a layer and what it caches per token."""


class StageTable:
    """Loads of stages [first, end) by rank. Immutable after construction but for its caches.

    With ``expert_parallel`` the ranks deal out whole experts, and ``profile`` is that variant of
    the profile given.
    """

    def __init__(
        self, profile: ModelProfile, tensor_parallel: int, expert_parallel: bool = False
    ) -> None:
        self.profile = profile.expert_parallel_variant if expert_parallel else profile
        self.tensor_parallel = tensor_parallel
        self._spec_bytes: dict[tuple[object, ...], int] = {}
        self._unit_rows: dict[tuple[object, ...], dict[str, float]] = {}
        known: dict[object, Load] = {}
        self.loads: list[Load] = []
        for rank in range(tensor_parallel):
            key = self._rank_key(rank)
            if key not in known:
                known[key] = self._load(rank)
            self.loads.append(known[key])

    def unit_bytes(self, unit: Unit, rank: int) -> int:
        """Bytes of a rank's slice of ``unit``."""
        return sum(self._local_bytes(spec, rank) for spec in unit.parameters)

    def footprint(self, unit: Unit, rank: int) -> int:
        """Bytes that the slice takes on any tier: its tensors aligned, the whole in pages."""
        return page_rounded(
            sum(
                -(-self._local_bytes(spec, rank) // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
                for spec in unit.parameters
            )
        )

    def _local_bytes(self, spec: ParameterSpec, rank: int) -> int:
        key = (spec.shape, spec.rule, spec.dtype_bytes, rank)
        if key not in self._spec_bytes:
            self._spec_bytes[key] = spec.local_bytes(self.profile.heads, rank, self.tensor_parallel)
        return self._spec_bytes[key]

    def _row(self, unit: Unit, rank: int) -> dict[str, float]:
        key = (rank, *_make(unit))
        if key not in self._unit_rows:
            self._unit_rows[key] = unit_row(
                unit,
                self.profile,
                rank,
                self.tensor_parallel,
                self.unit_bytes(unit, rank),
                self.footprint(unit, rank),
            )
        return self._unit_rows[key]

    def _sum(self, units: tuple[Unit, ...], rank: int) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for unit in units:
            for name, value in self._row(unit, rank).items():
                total[name] += value
        return total

    @cached_property
    def _ends(self) -> dict[str, tuple[Unit, ...]]:
        """The units before and after the layers, by the stage that holds them."""
        return {
            end: tuple(unit for unit in self.profile.units if unit.stage_end == end)
            for end in ("first", "last")
        }

    @cached_property
    def _layer_kinds(
        self,
    ) -> tuple[tuple[int, ...], tuple[tuple[tuple[Unit, ...], KVLayerSpec], ...]]:
        """By layer the number of its kind, and by kind its units and what it caches: layers of one
        kind differ in nothing but their place."""
        profile = self.profile
        by_layer: list[list[Unit]] = [[] for _ in range(profile.num_layers)]
        for unit in profile.units:
            if unit.layer is not None:
                by_layer[unit.layer].append(unit)
        numbers: dict[object, int] = {}
        kinds: list[LayerKind] = []
        layers: list[int] = []
        for units, cached in zip(by_layer, profile.kv_layers, strict=True):
            key = (replace(cached, layer=0), *(_make(unit) for unit in units))
            if key not in numbers:
                numbers[key] = len(kinds)
                kinds.append((tuple(units), cached))
            layers.append(numbers[key])
        return tuple(layers), tuple(kinds)

    def _rank_key(self, rank: int) -> object:
        """The same for ranks of the same load."""
        units = [unit for kind, _ in self._layer_kinds[1] for unit in kind]
        units += [unit for end in self._ends.values() for unit in end]
        rows = (tuple(self._row(unit, rank).items()) for unit in units)
        return (*self._heads(rank), *rows)

    def _heads(self, rank: int) -> tuple[int, int | None]:
        """A rank's query heads, and its key and value heads (None: all that a layer has)."""
        heads, world = self.profile.heads, self.tensor_parallel
        if world == 1 or not self.profile.kv_sharded:
            return heads.query, None
        ranges = heads.query_range(rank, world), heads.key_value_range(rank, world)
        query, key_value = (stop - start for start, stop in ranges)
        return query, key_value

    def _layer_row(self, kind: LayerKind, rank: int) -> dict[str, float]:
        units, cached = kind
        query, heads = self._heads(rank)
        held = cached if heads is None else replace(cached, key_heads=heads, value_heads=heads)
        return {
            **self._sum(units, rank),
            "num_layers": 1,
            "kv_bytes_per_token": held.elements_per_token * DTYPE_BYTES[self.profile.dtype],
            "attention_flops": 2 * query * (held.key_dim + held.value_dim),
        }

    def _load(self, rank: int) -> Load:
        profile, num_layers = self.profile, self.profile.num_layers
        layers, kinds = self._layer_kinds
        rows = [self._layer_row(kind, rank) for kind in kinds]
        of_kind = Load.stack(rows)
        of_ends = Load.stack([self._sum(units, rank) for units in self._ends.values()])
        both = tuple(  # one stage holds tied embeddings once
            unit for unit in profile.stage_units(0, num_layers) if unit.layer is None
        )
        whole_ends = Load.stack([self._sum(both, rank)])
        tables: dict[str, NDArray[np.float64]] = {}
        for name in Load.__dataclass_fields__:
            prefix = np.append(0.0, np.cumsum(getattr(of_kind, name)[list(layers)]))
            table = prefix[None, :] - prefix[:, None]
            first, last = getattr(of_ends, name)
            table[0, :num_layers] += first
            table[1:, num_layers] += last
            table[0, num_layers] += getattr(whole_ends, name)[0]
            tables[name] = table
        return Load(**tables)

    @cached_property
    def stage_groups(self) -> NDArray[np.int64]:
        """[first, end]: the same number for stages of the same make, whatever their place."""
        return _stage_groups(self._layer_kinds[0])

    @cached_property
    def group_loads(self) -> list[Load]:
        """By rank: the load of one stage of each of ``stage_groups``."""
        groups = self.stage_groups
        _, places = np.unique(groups, return_index=True)
        first, end = np.unravel_index(places[1:], groups.shape)
        known = {
            id(load): Load(
                **{name: getattr(load, name)[first, end] for name in Load.__dataclass_fields__}
            )
            for load in self.loads
        }
        return [known[id(load)] for load in self.loads]

    def stream_classes(self, units: tuple[Unit, ...], rank: int) -> tuple[UnitClass, ...]:
        """Those of the units that may lie on any tier, largest first."""
        sizes = Counter(self.stream_size(unit, rank) for unit in units if may_stream(unit))
        return tuple(
            UnitClass(size, count, routed)
            for (size, routed), count in sorted(sizes.items(), reverse=True)
        )

    def stream_size(self, unit: Unit, rank: int) -> tuple[int, int]:
        """A rank's bytes of a unit on any tier, in pages, and those of its routed experts."""
        return self.footprint(unit, rank), int(self._row(unit, rank).get("routed_bytes", 0))

    def longest_ring_bytes(self, rank: int) -> int:
        """The least ring that a rank needs if its largest units stream."""
        return self._longest_rings[rank]

    def slicing_ring_bytes(self, rank: int) -> int:
        """The ring in which each layer's units find room together, one after the other: beside
        those that are held, the larger part of what is free holds the next."""
        by_layer: dict[int | None, list[int]] = defaultdict(list)
        for unit in self.profile.units:
            if may_stream(unit):
                by_layer[unit.layer].append(self.footprint(unit, rank) + PAGE_BYTES)
        return max((sum(sizes) + max(sizes) for sizes in by_layer.values()), default=0)

    @cached_property
    def _longest_rings(self) -> list[int]:
        whole = self.profile.stage_units(0, self.profile.num_layers)
        known: dict[int, int] = {}  # ranks with equal loads hold equal units
        for rank, load in enumerate(self.loads):
            if id(load) not in known:
                classes = self.stream_classes(whole, rank)
                sizes = [each.size for each in classes for _ in range(each.number)]
                known[id(load)] = ring_bytes(sizes, min(RING_DEPTHS))
        return [known[id(load)] for load in self.loads]

    @cached_property
    def width(self) -> int:
        """The most elements per token that go into and come out of one unit's products, on any
        rank."""
        distinct = {
            tuple((s.shape, s.rule, s.num_experts) for s in unit.parameters): unit
            for unit in self.profile.units
            if unit.kind in (UnitKind.ATTENTION, UnitKind.MLP)
        }
        widths = {
            sum(self._side(spec, rank) for spec in unit.parameters)
            for unit in distinct.values()
            for rank in range(self.tensor_parallel)
        }
        return max(widths, default=0)

    def _side(self, spec: ParameterSpec, rank: int) -> int:
        """The larger side of a rank's matrix (of the routed experts' matrices): it goes in or comes
        out."""
        if len(spec.shape) < 2:
            return 0
        shape = spec.local_shape(self.profile.heads, rank, self.tensor_parallel)
        return max(shape[-2:]) * (self.profile.num_experts_per_token if spec.num_experts > 1 else 1)


@lru_cache(maxsize=64)
def _stage_groups(layers: tuple[int, ...]) -> NDArray[np.int64]:
    """[first, end] numbers by how many layers of each kind a stage has and which ends of the
    model; -1 where there is no stage."""
    num_layers = len(layers)
    counts = np.zeros((num_layers + 1, max(layers) + 1), dtype=np.int64)
    counts[1:] = np.cumsum(np.eye(max(layers) + 1, dtype=np.int64)[list(layers)], axis=0)
    first, end = np.triu_indices(num_layers + 1, 1)
    made_of = np.column_stack((counts[end] - counts[first], first == 0, end == num_layers))
    groups = np.full((num_layers + 1,) * 2, -1, dtype=np.int64)
    groups[first, end] = np.unique(made_of, axis=0, return_inverse=True)[1].reshape(-1)
    return groups


def _make(unit: Unit) -> tuple[object, ...]:
    """The same for units that differ in nothing but their names and places."""
    specs = unit.parameters
    return (unit.kind, *((s.shape, s.rule, s.dtype_bytes, s.num_experts) for s in specs))


def may_stream(unit: Unit) -> bool:
    """Whether all of the unit's bytes move when it is not resident."""
    return unit.kind not in (UnitKind.EMBEDDING, UnitKind.SMALL)
