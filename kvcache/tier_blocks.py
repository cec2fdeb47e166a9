"""The KV blocks of one tier: who holds them, what they contain, which may be reused next."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping

from kvcache.block_hash import tenant_of
from kvcache.eviction import EvictionPolicy, LeastRecentlyUsed


class TierBlocks:
    """Ref-counted blocks 0 to ``num_blocks - 1`` with a map from content hash to block.

    A block is *held* (reference count above 0), *blank* (free, its content worthless) or *idle*
    (free, its hashed content still findable until the block is taken). Idle blocks whose content
    the policy wants are *spared*. At most one block carries a hash. What a *suspect* block holds
    cannot be found, and it is taken only where no other is free.
    """

    def __init__(
        self,
        num_blocks: int,
        tenant_share: float = 1.0,
        policy: EvictionPolicy | None = None,
    ) -> None:
        """``policy`` says whose content should stay; None: that used last.

        The idle blocks of one tenant are at most ``tenant_share`` of all, and one at least: with
        one more, the one it used longest ago goes blank."""
        self.num_blocks = num_blocks
        self._tenant_limit = max(1, int(num_blocks * tenant_share))
        self._tenants: dict[bytes, OrderedDict[int, None]] = {}
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._blank = OrderedDict.fromkeys(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._spared: dict[int, None] = {}
        self._suspects: set[int] = set()
        self._free_suspects: deque[int] = deque()
        self._policy = policy or LeastRecentlyUsed()

    @property
    def num_free(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._blank) + len(self._idle) + len(self._spared) + len(self._free_suspects)

    @property
    def num_suspect(self) -> int:
        return len(self._suspects)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by its hash, held or idle."""
        return len(self._by_hash)

    def find(self, block_hash: bytes) -> int | None:
        """The block with that content."""
        return self._by_hash.get(block_hash)

    def hash_of(self, block_id: int) -> bytes | None:
        return self._hashes[block_id]

    def is_idle(self, block_id: int) -> bool:
        return block_id in self._idle or block_id in self._spared

    def take(self) -> tuple[int, bytes | None]:
        """Hold one free block for new content: a blank one, else the least recently used idle one,
        else the spared one that is wanted last, else a suspect one.

        Returns the block and the hash of the content that it loses. Raises IndexError when none is
        free.
        """
        if self._blank:
            block_id, lost = self._blank.popitem(last=False)[0], None
        elif self._idle or self._spared:
            block_id = next(iter(self._idle)) if self._idle else self._wanted_last()
            lost = self._hashes[block_id]
            assert lost is not None
            self._leave_idle(block_id)
            self._hashes[block_id] = None
            del self._by_hash[lost]
        elif self._free_suspects:
            block_id, lost = self._free_suspects.popleft(), None
        else:
            raise IndexError(f"all {self.num_blocks} blocks are held")
        self._references[block_id] = 1
        return block_id, lost

    def hold(self, block_id: int) -> None:
        """One more holder of a block that is held or idle."""
        if self._references[block_id] == 0:
            self._leave_idle(block_id)
        self._references[block_id] += 1

    def release(self, block_id: int) -> None:
        """One holder less; the last one leaves the block idle (most recently used), blank or
        suspect."""
        assert self._references[block_id] > 0, f"block {block_id} is freed twice"
        self._references[block_id] -= 1
        if self._references[block_id] == 0:
            if block_id in self._suspects:
                self._free_suspects.append(block_id)
            elif self._hashes[block_id] is None:
                self._blank[block_id] = None
            else:
                self._become_idle(block_id)

    def touch(self, block_id: int) -> None:
        """Make a block the most recently used, if it is idle."""
        if self.is_idle(block_id):
            self._leave_idle(block_id)
            self._become_idle(block_id)

    def spare(self) -> None:
        """The policy wants other content than before."""
        for block_id in [b for b in self._spared if self._rank(b) is None]:
            del self._spared[block_id]
            self._idle[block_id] = None
        for block_hash in self._policy.wanted:
            known = self._by_hash.get(block_hash)
            if known is not None and known in self._idle:
                del self._idle[known]
                self._spared[known] = None

    def put(self, block_id: int, block_hash: bytes) -> None:
        """Give a free block this content, as the most recently used, unless another offers it."""
        assert self._references[block_id] == 0, f"block {block_id} is held"
        self.forget(block_id)
        if block_hash not in self._by_hash:
            del self._blank[block_id]
            self._hashes[block_id] = block_hash
            self._by_hash[block_hash] = block_id
            self._become_idle(block_id)

    def free_blocks(self) -> list[tuple[int, bytes | None]]:
        """The free blocks with their content, suspect ones left out: blank ones, then those used
        longest ago first, then those spared."""
        free = (*self._blank, *self._idle, *self._spared)
        return [(block_id, self._hashes[block_id]) for block_id in free]

    def forget(self, block_id: int) -> None:
        """Make the content of a block, if it has any, unfindable: it is worthless."""
        block_hash = self._hashes[block_id]
        if block_hash is None:
            return
        if self.is_idle(block_id):
            self._leave_idle(block_id)
            self._blank[block_id] = None
        self._hashes[block_id] = None
        del self._by_hash[block_hash]

    def suspect(self, block_id: int) -> None:
        """Make a block, for good, one that is not relied on."""
        self.forget(block_id)
        self._suspects.add(block_id)
        if block_id in self._blank:
            del self._blank[block_id]
            self._free_suspects.append(block_id)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Make the content of a held block findable, unless another block offers the same."""
        assert self._references[block_id] > 0, f"block {block_id} is registered but not held"
        if block_id in self._suspects:
            return
        if block_hash not in self._by_hash and self._hashes[block_id] is None:
            self._hashes[block_id] = block_hash
            self._by_hash[block_hash] = block_id

    def _become_idle(self, block_id: int) -> None:
        free = self._idle if self._rank(block_id) is None else self._spared
        free[block_id] = None
        own = self._tenants.setdefault(self._tenant(block_id), OrderedDict())
        own[block_id] = None
        if len(own) > self._tenant_limit:
            self.forget(next(iter(own)))

    def _leave_idle(self, block_id: int) -> None:
        del (self._idle if block_id in self._idle else self._spared)[block_id]
        tenant = self._tenant(block_id)
        own = self._tenants[tenant]
        del own[block_id]
        if not own:
            del self._tenants[tenant]

    def _wanted_last(self) -> int:
        return max(self._spared, key=lambda block_id: self._rank(block_id) or 0)

    def _rank(self, block_id: int) -> int | None:
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        return self._policy.rank(block_hash)

    def _tenant(self, block_id: int) -> bytes:
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        return tenant_of(block_hash)

    def check_integrity(self, references: Mapping[int, int] | None = None) -> None:
        """Assert that every block is in exactly one state, and the reference counts, if given."""
        blank, idle = set(self._blank), {*self._idle, *self._spared}
        assert len(idle) == len(self._idle) + len(self._spared), "a block is idle twice"
        assert all(self._rank(b) is not None for b in self._spared), "nobody wants a spared block"
        assert all(self._rank(b) is None for b in self._idle), "a wanted block is not spared"
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not blank & idle, "a block is both blank and idle"
        apart = set(self._free_suspects)
        assert len(apart) == len(self._free_suspects), "a suspect block is free twice"
        assert not self._suspects & (blank | idle) and apart <= self._suspects
        assert all(self._hashes[block_id] is None for block_id in self._suspects)
        for block_id, count in enumerate(self._references):
            assert count >= 0, f"block {block_id} has {count} holders"
            assert (count == 0) == (block_id in blank | idle | apart), (
                f"block {block_id} has {count} holders, but blank={block_id in blank}, "
                f"idle={block_id in idle}, suspect={block_id in apart}"
            )
            if references is not None:
                holders = references.get(block_id, 0)
                assert count == holders, f"block {block_id} counts {count} of {holders} holders"
        hashed = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert hashed == self._by_hash, "the hash map does not name the blocks' contents"
        assert all(self._hashes[block_id] is None for block_id in blank), "a blank block has a hash"
        assert all(self._hashes[block_id] is not None for block_id in idle), "idle without a hash"
        owned = [block_id for own in self._tenants.values() for block_id in own]
        assert sorted(owned) == sorted(idle), "a tenant's idle blocks are not those of the tier"
        assert all(len(own) <= self._tenant_limit for own in self._tenants.values())
