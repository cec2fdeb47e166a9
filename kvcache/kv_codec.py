"""KV in one byte an element: how it goes below the device, and comes up again.

Symmetric, with a scale for each head of a block, so that one outlying head coarsens no other. A
block's keys and values are read as often as the model attends to them, so an error does not grow:
what was encoded once and is encoded again differs by rounding alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvcache.layout import SCALE_BYTES, KVLayout

_STORED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""By storage dtype: torch's, and the largest value it holds."""


class _Half(NamedTuple):
    """Keys or values: where they and their scales lie, in bytes."""

    start: int
    stop: int
    stored: int
    scales: int
    heads: int
    dim: int


class KVCodec:
    """Converts the pieces that one layer has of blocks."""

    def __init__(self, layout: KVLayout, layer: int) -> None:
        """For the ``layer``-th layer of ``layout``, whose storage dtype is not "auto"."""
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._stored, self._limit = _STORED[layout.storage_dtype]
        self._block_size = layout.block_size
        spec, piece = layout.layers[layer], layout.piece(layer)
        keys = layout.block_size * spec.key_heads * spec.key_dim
        values = layout.block_size * spec.value_heads * spec.value_dim
        scales = keys + values
        after = scales + SCALE_BYTES * spec.key_heads
        halves = (
            _Half(0, piece.key_bytes, 0, scales, spec.key_heads, spec.key_dim),
            _Half(piece.key_bytes, piece.num_bytes, keys, after, spec.value_heads, spec.value_dim),
        )
        self._halves = [half for half in halves if half.start < half.stop]

    def encode(self, pieces: torch.Tensor, stored: torch.Tensor) -> None:
        """Fill ``stored`` [N, bytes] from ``pieces`` [N, bytes], both uint8, on one device."""
        for half in self._halves:
            shape = (-1, self._block_size, half.heads, half.dim)
            found = pieces[:, half.start : half.stop].view(self._dtype).view(shape).float()
            scales = found.abs().amax((1, 3)) / self._limit
            scales = torch.where(scales > 0, scales, 1.0)
            found = found / scales[:, None, :, None]
            if self._stored is torch.int8:
                found = found.round()
            small = found.clamp(-self._limit, self._limit).to(self._stored)
            size = self._block_size * half.heads * half.dim
            stored[:, half.stored : half.stored + size] = small.view(torch.uint8).flatten(1)
            end = half.scales + SCALE_BYTES * half.heads
            stored[:, half.scales : end] = scales.contiguous().view(torch.uint8)

    def decode(self, stored: torch.Tensor, pieces: torch.Tensor) -> None:
        """Fill ``pieces`` from ``stored``: the inverse of `encode`, up to its rounding."""
        for half in self._halves:
            size = self._block_size * half.heads * half.dim
            shape = (-1, self._block_size, half.heads, half.dim)
            small = stored[:, half.stored : half.stored + size].contiguous().view(self._stored)
            end = half.scales + SCALE_BYTES * half.heads
            scales = stored[:, half.scales : end].contiguous().view(torch.float32)
            found = small.view(shape).float() * scales[:, None, :, None]
            target = pieces[:, half.start : half.stop].view(self._dtype)
            target.copy_(found.flatten(1))


def codecs(layout: KVLayout) -> list[KVCodec | None]:
    """One for each layer; none where KV lies below the device as it is."""
    if layout.storage_dtype == "auto":
        return [None] * len(layout.layers)
    return [KVCodec(layout, layer) for layer in range(len(layout.layers))]
