"""Rows on the host for the blocks of NVMe to which every pass adds a token."""

from __future__ import annotations

from collections.abc import Collection

import torch


class TailRows:
    """Which of the blocks that are not full yet has which of ``rows`` [N, block_bytes]."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self._free = list(range(rows.shape[0]))
        self._held: dict[int, int] = {}  # rows by block, used last comes last

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def __getitem__(self, block: int) -> int:
        return self._held[block]

    def keep(self, block: int) -> bool:
        """Whether the block has a row from now on: it had one, or one is free."""
        if block not in self._held and not self._free:
            return False
        row = self._held.pop(block, None)
        self._held[block] = self._free.pop() if row is None else row
        return True

    def drop(self, block: int) -> None:
        """The block, if it has a row, needs it no longer."""
        row = self._held.pop(block, None)
        if row is not None:
            self._free.append(row)

    def in_the_way(self, coming: Collection[int], used: Collection[int]) -> list[int]:
        """The blocks, none of ``used``, that must go for those that are ``coming``: used longest
        ago first."""
        missing = sum(block not in self._held for block in coming) - len(self._free)
        others = [block for block in self._held if block not in used]
        return others[: max(0, missing)]
