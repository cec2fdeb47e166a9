"""Where a parameter's values come from: stored tensors, put together without ever holding them
whole.

Every source reads a *box*, one [start, stop) range a dimension, into a tensor of the box's shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from giantserve.safetensors_file import StoredTensor

T = TypeVar("T")
Box = tuple[tuple[int, int], ...]


class TensorSource(ABC):
    """A tensor of a known shape, any box of which can be read."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, box: Box, out: torch.Tensor) -> None:
        """Write the values of ``box`` into ``out``, converted to its dtype."""


class Stored(TensorSource):
    """A tensor of the checkpoint as it is."""

    def __init__(self, tensor: StoredTensor) -> None:
        self.shape = tensor.shape
        self._tensor = tensor

    def read(self, box: Box, out: torch.Tensor) -> None:
        self._tensor.read(box, out)


class Concatenated(TensorSource):
    """Tensors one after another along ``dim``."""

    def __init__(self, parts: Sequence[TensorSource], dim: int) -> None:
        first = parts[0].shape
        self._parts = parts
        self._dim = dim % len(first)
        total = sum(part.shape[self._dim] for part in parts)
        self.shape = (*first[: self._dim], total, *first[self._dim + 1 :])

    def read(self, box: Box, out: torch.Tensor) -> None:
        begin, end = box[self._dim]
        offset = 0
        for part in self._parts:
            size = part.shape[self._dim]
            start, stop = max(begin, offset), min(end, offset + size)
            if start < stop:
                local = _replace(box, self._dim, (start - offset, stop - offset))
                part.read(local, out.narrow(self._dim, start - begin, stop - start))
            offset += size


class Stacked(TensorSource):
    """Tensors of one shape along a new dimension ``dim``."""

    def __init__(self, parts: Sequence[TensorSource], dim: int) -> None:
        first = parts[0].shape
        self._parts = parts
        self._dim = dim % (len(first) + 1)
        self.shape = (*first[: self._dim], len(parts), *first[self._dim :])

    def read(self, box: Box, out: torch.Tensor) -> None:
        begin, end = box[self._dim]
        inner = box[: self._dim] + box[self._dim + 1 :]
        for index in range(begin, end):
            self._parts[index].read(inner, out.select(self._dim, index - begin))


class Transposed(TensorSource):
    """A tensor with two dimensions exchanged."""

    def __init__(self, part: TensorSource, dim0: int, dim1: int) -> None:
        rank = len(part.shape)
        self._part = part
        self._dims = (dim0 % rank, dim1 % rank)
        self.shape = _exchange(part.shape, *self._dims)

    def read(self, box: Box, out: torch.Tensor) -> None:
        self._part.read(_exchange(box, *self._dims), out.transpose(*self._dims))


class Narrowed(TensorSource):
    """The elements [start, stop) of a tensor along ``dim``."""

    def __init__(self, part: TensorSource, dim: int, start: int, stop: int) -> None:
        self._part = part
        self._dim = dim % len(part.shape)
        self._start = start
        self.shape = (*part.shape[: self._dim], stop - start, *part.shape[self._dim + 1 :])

    def read(self, box: Box, out: torch.Tensor) -> None:
        start, stop = box[self._dim]
        shifted = _replace(box, self._dim, (start + self._start, stop + self._start))
        self._part.read(shifted, out)


class Computed(TensorSource):
    """A tensor that ``compute`` returns whole: for conversions that no box of the inputs
    answers."""

    def __init__(self, shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> None:
        self.shape = shape
        self._compute = compute

    def read(self, box: Box, out: torch.Tensor) -> None:
        out.copy_(self._compute()[tuple(slice(start, stop) for start, stop in box)])


def _replace(box: Box, dim: int, span: tuple[int, int]) -> Box:
    return (*box[:dim], span, *box[dim + 1 :])


def _exchange(values: tuple[T, ...], dim0: int, dim1: int) -> tuple[T, ...]:
    exchanged = list(values)
    exchanged[dim0], exchanged[dim1] = exchanged[dim1], exchanged[dim0]
    return tuple(exchanged)
