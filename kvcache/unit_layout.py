"""How a unit's tensors lie in its bytes. The same on every tier, so that moving a unit is one
copy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvcache.arena import ALIGNMENT

TENSOR_ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype or vector load asks for."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor of a unit: ``offset`` is in bytes from the unit's start."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

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
        cls, name: str, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]
    ) -> UnitLayout:
        """Lay ``(name, shape, dtype)`` one after another, each on a multiple of 64 bytes."""
        slots = []
        offset = 0
        for tensor_name, shape, dtype in tensors:
            slots.append(TensorSlot(tensor_name, offset, tuple(shape), dtype))
            offset += -(-slots[-1].num_bytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        return cls(name, tuple(slots), -(-offset // ALIGNMENT) * ALIGNMENT)

    def slot(self, tensor: str) -> TensorSlot:
        """The slot of that name; KeyError if the unit has none."""
        for slot in self.tensors:
            if slot.name == tensor:
                return slot
        raise KeyError(f"unit {self.name} has no tensor {tensor}")

    def views(self, unit_bytes: torch.Tensor) -> dict[str, torch.Tensor]:
        """All tensors by name, sharing the memory of ``unit_bytes``."""
        return {slot.name: slot.view(unit_bytes) for slot in self.tensors}
