"""How a unit's tensors lie in its bytes. The same on every tier, so that moving a unit is one
copy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from kvcache.arena import ALIGNMENT

TENSOR_ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype or vector load asks for."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor of a unit: ``offset`` is in bytes from the unit's start. ``by_expert``: its first
    dimension counts experts, each of which may be read by itself."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    by_expert: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, stop: int) -> tuple[int, int]:
        """The bytes [start, stop) of the unit that hold the tensor's rows [first, stop)."""
        row_bytes = self.num_bytes // self.shape[0]
        return self.offset + first * row_bytes, self.offset + stop * row_bytes

    def view(self, unit_bytes: torch.Tensor) -> torch.Tensor:
        """The tensor within the bytes of its unit; shares their memory."""
        flat = unit_bytes[self.offset : self.offset + self.num_bytes]
        return flat.view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """A unit: its tensors and its size, a multiple of 4096."""

    name: str
    tensors: tuple[TensorSlot, ...]
    num_bytes: int

    @classmethod
    def pack(
        cls,
        name: str,
        tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
        by_expert: Collection[str] = (),
    ) -> UnitLayout:
        """Lay ``(name, shape, dtype)`` one after another, each on a multiple of 64 bytes, those
        named in ``by_expert`` last."""
        slots = []
        offset = 0
        for tensor_name, shape, dtype in sorted(tensors, key=lambda each: each[0] in by_expert):
            slots.append(
                TensorSlot(tensor_name, offset, tuple(shape), dtype, tensor_name in by_expert)
            )
            offset += -(-slots[-1].num_bytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        return cls(name, tuple(slots), -(-offset // ALIGNMENT) * ALIGNMENT)

    @property
    def expert_slots(self) -> tuple[TensorSlot, ...]:
        """The tensors of which experts are read by themselves. They lie last."""
        return tuple(slot for slot in self.tensors if slot.by_expert)

    @property
    def num_experts(self) -> int:
        slots = self.expert_slots
        return slots[0].shape[0] if slots else 0

    @property
    def dense_bytes(self) -> int:
        """Of what every pass uses: all but the experts."""
        slots = self.expert_slots
        return slots[0].offset if slots else self.num_bytes

    def sections(self) -> tuple[tuple[int, int], ...]:
        """The bytes [start, stop) of what is read by itself: what every pass uses, then the experts
        of one tensor after another. Of a unit without experts, all of it."""
        experts = [
            slot.rows(expert, expert + 1)
            for slot in self.expert_slots
            for expert in range(slot.shape[0])
        ]
        return ((0, self.dense_bytes), *experts)

    def slot(self, tensor: str) -> TensorSlot:
        """The slot of that name; KeyError if the unit has none."""
        for slot in self.tensors:
            if slot.name == tensor:
                return slot
        raise KeyError(f"unit {self.name} has no tensor {tensor}")

    def views(self, unit_bytes: torch.Tensor) -> dict[str, torch.Tensor]:
        """All tensors by name, sharing the memory of ``unit_bytes``."""
        return {slot.name: slot.view(unit_bytes) for slot in self.tensors}
