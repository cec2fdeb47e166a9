"""Checksums of many equal pieces of memory at once."""

from __future__ import annotations

import torch

WORD_BYTES = 8
_SEED = 0x5EED


class PieceChecksum:
    """A multilinear hash modulo 2^64 (Lemire and Kaser, 2014): the sum of the words, each times an
    odd weight of its own.

    A change within one word never goes unseen, any other with probability 2^-63 or so. Not for
    data that an adversary writes.
    """

    def __init__(self, num_bytes: int) -> None:
        """For pieces of ``num_bytes``, a multiple of 8."""
        if num_bytes % WORD_BYTES:
            raise ValueError(f"pieces of {num_bytes} bytes are not whole words of {WORD_BYTES}")
        generator = torch.Generator().manual_seed(_SEED)
        words = num_bytes // WORD_BYTES
        self._weights = torch.randint(-(2**62), 2**62, (words,), generator=generator) * 2 + 1

    def of(self, pieces: torch.Tensor) -> torch.Tensor:
        """``pieces`` [N, num_bytes] uint8, rows contiguous, to int64 [N]."""
        words = pieces.view(torch.int64)
        return (words * self._weights).sum(dim=1)
