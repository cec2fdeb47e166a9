"""Checksums of many equal pieces of memory at once."""

from __future__ import annotations

import torch

SECTOR_WORDS, SECTOR_BYTES = 64, 512
_SEED = 0x5EED
_HALF_BITS = 32


class PieceChecksum:
    """A multilinear hash modulo 2^64 (Lemire and Kaser, 2014) of sums: those of the words of each
    sector, and those of the words at each place of all sectors. Two passes at the speed of memory,
    and products of little.

    A change goes unseen with probability 2^-32 or so: sums are weighed in halves, since a product
    keeps little of a high bit. Not for data that an adversary writes.
    """

    def __init__(self, num_bytes: int) -> None:
        """For pieces of ``num_bytes``, a multiple of 512."""
        if num_bytes % SECTOR_BYTES:
            raise ValueError(f"pieces of {num_bytes} bytes are not whole sectors of {SECTOR_BYTES}")
        count = num_bytes // SECTOR_BYTES + SECTOR_WORDS
        generator = torch.Generator().manual_seed(_SEED)
        weights = torch.randint(-(2**62), 2**62, (2, count), generator=generator) * 2 + 1
        self._low, self._high = weights

    def of(self, pieces: torch.Tensor) -> torch.Tensor:
        """``pieces`` [N, num_bytes] uint8, rows contiguous, to int64 [N]."""
        words = pieces.view(torch.int64).view(pieces.shape[0], -1, SECTOR_WORDS)
        sums = torch.cat((words.sum(2), words.sum(1)), dim=1)
        high = sums >> _HALF_BITS
        low = sums - (high << _HALF_BITS)
        weighed: torch.Tensor = low * self._low + high * self._high
        return weighed.sum(1)
