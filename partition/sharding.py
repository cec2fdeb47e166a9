"""How a parameter is dealt out over the ranks of a tensor-parallel group. Pure arithmetic on
shapes.

The planner counts bytes with these rules and the shards load slices with them: one source of truth.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Deal(enum.Enum):
    """In what portions a dimension is dealt: single elements, query heads, or key/value heads."""

    EVEN = "even"
    QUERY_HEADS = "query_heads"
    KEY_VALUE_HEADS = "key_value_heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCounts:
    """The attention heads of a model. Queries come in ``key_value`` groups of equal size (GQA)."""

    query: int
    key_value: int

    def query_range(self, rank: int, world: int) -> tuple[int, int]:
        """The query heads [start, stop) of ``rank``; whole KV groups while there are enough of
        them."""
        group = self.query // self.key_value
        if world <= self.key_value:
            start, stop = _deal(self.key_value, rank, world)
            return start * group, stop * group
        head, within, sharers = self._shared_head(rank, world)
        start, stop = _deal(group, within, sharers)
        return head * group + start, head * group + stop

    def key_value_range(self, rank: int, world: int) -> tuple[int, int]:
        """The KV heads [start, stop) of ``rank``; a head is replicated where ranks outnumber
        heads."""
        if world <= self.key_value:
            return _deal(self.key_value, rank, world)
        head, _, _ = self._shared_head(rank, world)
        return head, head + 1

    def _shared_head(self, rank: int, world: int) -> tuple[int, int, int]:
        """(KV head, index among the ranks that share it, how many share it) when world > KV
        heads."""
        for head in range(self.key_value):
            first, end = _deal(world, head, self.key_value)
            if first <= rank < end:
                return head, rank - first, end - first
        raise AssertionError(f"rank {rank} outside a group of {world}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRule:
    """Which dimension is dealt, and how. ``segments`` > 1: several matrices packed along the
    dimension (gate and up), each dealt by itself."""

    dim: int
    deal: Deal = Deal.EVEN
    segments: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """One parameter of the model: its name in the transformers module tree, full shape and shard
    rule.

    ``num_experts`` > 1: the leading dimension counts experts. ``is_buffer``: saved with the model,
    not trained.
    """

    name: str
    shape: tuple[int, ...]
    dtype_bytes: int
    rule: ShardRule | None = None
    num_experts: int = 1
    is_buffer: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def ranges(self, heads: HeadCounts, rank: int, world: int) -> tuple[tuple[int, int], ...]:
        """The [start, stop) ranges along ``rule.dim`` that ``rank`` holds, one a segment."""
        assert self.rule is not None
        size = self.shape[self.rule.dim]
        return tuple(deal_ranges(self.rule, size, heads, rank, world))

    def local_shape(self, heads: HeadCounts, rank: int, world: int) -> tuple[int, ...]:
        """The shape of the slice that ``rank`` of ``world`` holds."""
        if self.rule is None or world == 1:
            return self.shape
        held = sum(stop - start for start, stop in self.ranges(heads, rank, world))
        return (*self.shape[: self.rule.dim], held, *self.shape[self.rule.dim + 1 :])

    def local_bytes(self, heads: HeadCounts, rank: int, world: int) -> int:
        return math.prod(self.local_shape(heads, rank, world)) * self.dtype_bytes


def deal_ranges(
    rule: ShardRule, size: int, heads: HeadCounts, rank: int, world: int
) -> list[tuple[int, int]]:
    """Deal a dimension of ``size`` elements; raises ValueError where the portions do not divide
    it."""
    segment, remainder = divmod(size, rule.segments)
    if remainder:
        raise ValueError(f"{size} elements do not split into {rule.segments} segments")
    if rule.deal is Deal.EVEN:
        start, stop, width = *_deal(segment, rank, world), 1
    else:
        of_queries = rule.deal is Deal.QUERY_HEADS
        count = heads.query if of_queries else heads.key_value
        width, remainder = divmod(segment, count)
        if remainder:
            raise ValueError(f"{segment} elements do not split into {count} heads")
        pick = heads.query_range if of_queries else heads.key_value_range
        start, stop = pick(rank, world)
    return [
        (index * segment + start * width, index * segment + stop * width)
        for index in range(rule.segments)
    ]


def _deal(count: int, rank: int, world: int) -> tuple[int, int]:
    """The [start, stop) portion of ``count`` things for ``rank``: contiguous, sizes differ by at
    most 1."""
    return rank * count // world, (rank + 1) * count // world
