"""What every possible stage of a model holds, for one tensor-parallel degree: all ranges of layers
at once."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from partition.cost import Load, page_rounded, unit_row
from partition.profile import ModelProfile, Unit, UnitKind
from partition.sharding import ParameterSpec
from partition.tier_choice import ring_bytes

TENSOR_ALIGNMENT = 64
"""Within a unit each tensor starts at a multiple of this many bytes."""


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
        self.loads = [self._load(rank) for rank in range(tensor_parallel)]

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
        key = (
            unit.kind,
            rank,
            tuple((s.shape, s.rule, s.dtype_bytes, s.num_experts) for s in unit.parameters),
        )
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

    def _sum(self, units: tuple[Unit, ...], rank: int) -> Counter[str]:
        total: Counter[str] = Counter()
        for unit in units:
            for name, value in self._row(unit, rank).items():
                total[name] += value  # type: ignore[assignment]
        return total

    def _load(self, rank: int) -> Load:
        profile, world = self.profile, self.tensor_parallel
        num_layers = profile.num_layers
        by_layer: list[list[Unit]] = [[] for _ in range(num_layers)]
        for unit in profile.units:
            if unit.layer is not None:
                by_layer[unit.layer].append(unit)
        layout = profile.kv_layout(0, num_layers, 1, rank, world)
        query = profile.heads.query
        if profile.kv_sharded and world > 1:
            start, stop = profile.heads.query_range(rank, world)
            query = stop - start
        rows: list[dict[str, float]] = [{}]
        total: Counter[str] = Counter()
        element = layout.bytes_per_token / max(1, sum(s.elements_per_token for s in layout.layers))
        for units, spec in zip(by_layer, layout.layers, strict=True):
            total.update(self._sum(tuple(units), rank))
            total.update(
                {
                    "num_layers": 1,
                    "kv_bytes_per_token": spec.elements_per_token * element,
                    "attention_flops": 2 * query * (spec.key_dim + spec.value_dim),
                }
            )
            rows.append(dict(total))
        prefix = Load.stack(rows)
        ends = {
            end: Load.stack(
                [dict(self._sum(tuple(u for u in profile.units if u.stage_end == end), rank))]
            )
            for end in ("first", "last")
        }
        whole = Load.stack([dict(self._sum(profile.stage_units(0, num_layers), rank))])
        layers_only = ("num_layers", "kv_bytes_per_token", "attention_flops")
        tables: dict[str, NDArray[np.float64]] = {}
        for name in Load.__dataclass_fields__:
            column = getattr(prefix, name)
            table = column[None, :] - column[:, None]
            table[0, :] += getattr(ends["first"], name)[0]
            table[:, num_layers] += getattr(ends["last"], name)[0]
            if name not in layers_only:  # one stage holds tied embeddings once
                table[0, num_layers] = getattr(whole, name)[0]
            tables[name] = table
        return Load(**tables)

    @cached_property
    def stage_groups(self) -> NDArray[np.int64]:
        """[first, end]: the same number for stages of the same make, whatever their place."""
        profile = self.profile
        layer_key: dict[int, list[object]] = {i: [] for i in range(profile.num_layers)}
        for unit in profile.units:
            if unit.layer is not None:
                layer_key[unit.layer].append(
                    (unit.kind, *(self.unit_bytes(unit, r) for r in range(self.tensor_parallel)))
                )
        kv = profile.kv_layers
        types = [
            (tuple(layer_key[i]), kv[i].elements_per_token, kv[i].key_heads)
            for i in range(profile.num_layers)
        ]
        number = {kind: index for index, kind in enumerate(dict.fromkeys(types))}
        counts = np.zeros((profile.num_layers + 1, len(number)), dtype=np.int64)
        for layer, kind in enumerate(types):
            counts[layer + 1] = counts[layer]
            counts[layer + 1, number[kind]] += 1
        groups = np.full((profile.num_layers + 1,) * 2, -1, dtype=np.int64)
        seen: dict[tuple[object, ...], int] = {}
        for first in range(profile.num_layers):
            for end in range(first + 1, profile.num_layers + 1):
                made_of = (counts[end] - counts[first]).tobytes()
                key = (made_of, first == 0, end == profile.num_layers)
                groups[first, end] = seen.setdefault(key, len(seen))
        return groups

    def stream_classes(self, units: tuple[Unit, ...], rank: int) -> tuple[tuple[int, int], ...]:
        """(page-rounded size, count) of the units that may lie on any tier, largest first."""
        sizes = Counter(self.footprint(unit, rank) for unit in units if may_stream(unit))
        return tuple(sorted(sizes.items(), reverse=True))

    def longest_ring_bytes(self, rank: int) -> int:
        """The ring that a rank needs if its largest units stream."""
        return self._longest_rings[rank]

    @cached_property
    def _longest_rings(self) -> list[int]:
        whole = self.profile.stage_units(0, self.profile.num_layers)
        return [
            ring_bytes(
                [size for size, count in self.stream_classes(whole, rank) for _ in range(count)]
            )
            for rank in range(self.tensor_parallel)
        ]

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


def may_stream(unit: Unit) -> bool:
    """Whether all of the unit's bytes move when it is not resident."""
    return unit.kind not in (UnitKind.EMBEDDING, UnitKind.SMALL)
