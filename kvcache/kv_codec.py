"""KV in one byte an element: how it goes below the device, and comes up again.

Symmetric, with a scale for each head of a block, so that one outlying head coarsens no other. What
was encoded once and is encoded again differs by rounding alone, unless a larger element has joined
its head of the block: the scale is coarser then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kvcache.layout import SCALE_BYTES, KVLayout

_STORED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""By storage dtype: torch's, and the largest value it holds."""

CHUNK_BYTES = 256 << 10
"""What a CPU converts at a time: its caches hold it, its copy in fp32 and what comes out."""

_FP8_BITS = 0x87F0 - (1 << 16)
"""Sign, exponent and mantissa of E4M3 four bits further up: those of a bf16 2^120 times smaller,
as the exponents' biases are 7 and 127. As an int16, which is signed."""


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
        for some, into in self._chunks(pieces, stored):
            for half in self._halves:
                shape = (-1, self._block_size, half.heads, half.dim)
                found = some[:, half.start : half.stop].view(self._dtype).view(shape).float()
                scales = found.abs().amax((1, 3)) / self._limit
                scales = torch.where(scales == 0, 1.0, scales)
                found = found / scales[:, None, :, None]
                if self._stored is torch.int8:
                    found.round_()
                target, target_scales = self._parts(into, half)
                target.copy_(found.clamp_(-self._limit, self._limit))
                target_scales.copy_(scales.contiguous().view(torch.uint8))

    def decode(self, stored: torch.Tensor, pieces: torch.Tensor) -> None:
        """Fill ``pieces`` from ``stored``: the inverse of `encode`, up to its rounding."""
        for into, some in self._chunks(pieces, stored):
            for half in self._halves:
                small, found_scales = self._parts(some, half)
                scales = found_scales.contiguous().view(torch.float32)
                target = into[:, half.start : half.stop].view(self._dtype).view(small.shape)
                torch.mul(_widened(small), scales[:, None, :, None], out=target)

    def _chunks(
        self, pieces: torch.Tensor, stored: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = pieces.shape[0]
        if pieces.device.type == "cpu":
            count = max(1, CHUNK_BYTES // self._halves[-1].stop)
        chunks = torch.split(pieces, max(1, count)), torch.split(stored, max(1, count))
        return zip(*chunks, strict=True)

    def _parts(self, stored: torch.Tensor, half: _Half) -> tuple[torch.Tensor, torch.Tensor]:
        """The elements [N, block size, heads, dim] and the bytes of their scales."""
        size = self._block_size * half.heads * half.dim
        shape = (-1, self._block_size, half.heads, half.dim)
        elements = stored[:, half.stored : half.stored + size].view(self._stored).view(shape)
        return elements, stored[:, half.scales : half.scales + SCALE_BYTES * half.heads]


def _widened(small: torch.Tensor) -> torch.Tensor:
    """The elements in a dtype that multiplies fast: torch converts fp8 one by one on a CPU."""
    if small.dtype is torch.int8:
        return small
    bits = small.view(torch.int8).to(torch.int16)
    bits.bitwise_left_shift_(4).bitwise_and_(_FP8_BITS)
    return bits.view(torch.bfloat16).mul_(2.0**120)


def codecs(layout: KVLayout) -> list[KVCodec | None]:
    """One for each layer; none where KV lies below the device as it is."""
    if layout.storage_dtype == "auto":
        return [None] * len(layout.layers)
    return [KVCodec(layout, layer) for layer in range(len(layout.layers))]
