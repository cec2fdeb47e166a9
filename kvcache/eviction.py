"""Which cached content a tier gives up when it needs a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence


class EvictionPolicy(ABC):
    """Says which content should stay; of the rest goes what was used longest ago. The tiers of a
    pool share one."""

    @property
    @abstractmethod
    def wanted(self) -> Collection[bytes]:
        """The hashes of what should stay."""

    @abstractmethod
    def rank(self, block_hash: bytes) -> int | None:
        """How soon this content is wanted, 0 first; None: nobody is known to want it."""

    @abstractmethod
    def expect(self, upcoming: Iterable[Sequence[bytes]]) -> None:
        """Hear what content each of the requests that run next would match, the next one first."""


class LeastRecentlyUsed(EvictionPolicy):
    """Nothing is known of what comes."""

    @property
    def wanted(self) -> Collection[bytes]:
        return ()

    def rank(self, block_hash: bytes) -> int | None:
        return None

    def expect(self, upcoming: Iterable[Sequence[bytes]]) -> None:
        return


class NextRequests(EvictionPolicy):
    """What the requests that run next will match stays longest, and of that what is wanted soonest
    (Belady, 1966, as far as the queue lets one see)."""

    def __init__(self) -> None:
        self._ranks: dict[bytes, int] = {}

    @property
    def wanted(self) -> Collection[bytes]:
        return self._ranks.keys()

    def rank(self, block_hash: bytes) -> int | None:
        return self._ranks.get(block_hash)

    def expect(self, upcoming: Iterable[Sequence[bytes]]) -> None:
        self._ranks = {}
        for hashes in upcoming:
            for block_hash in hashes:
                self._ranks.setdefault(block_hash, len(self._ranks))
