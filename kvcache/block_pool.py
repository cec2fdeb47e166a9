"""KV block bookkeeping over the tiers. Moves no bytes: it orders copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from kvcache.block_copy import BlockCopy
from kvcache.eviction import EvictionPolicy, LeastRecentlyUsed
from kvcache.tier import Tier
from kvcache.tier_blocks import TierBlocks

SUSPECT_LOSSES = 2
"""After how many losses of a rotating block its place on the disk is to blame."""


class CachedBlock(NamedTuple):
    """Where the content of one matched block lies."""

    tier: Tier
    block_id: int


def after_copies(
    lost: Collection[CachedBlock], copies: Iterable[BlockCopy], later: Iterable[BlockCopy]
) -> set[CachedBlock]:
    """Where the content that a pass lost lies once its own ``copies`` and ``later`` ones have run:
    some take it along, others replace it."""
    own = list(copies)
    found = set(lost) - {CachedBlock(copy.target, copy.target_id) for copy in own}
    for copy, is_own in (*((each, True) for each in own), *((each, False) for each in later)):
        target = CachedBlock(copy.target, copy.target_id)
        if CachedBlock(copy.source, copy.source_id) in found or (is_own and target in lost):
            found.add(target)
        else:
            found.discard(target)
    return found


class BlockPool:
    """Deals out the KV blocks of all tiers and keeps finished content findable for later prompts.

    The bytes lie elsewhere: whatever must move is queued as a `BlockCopy`, and `take_copies` hands
    the queue over. Its order matters: the holder of the bytes runs all copies in order, before any
    write to blocks allocated since the previous hand-over, and after all earlier writes.

    Ids past the last device block name *rotating* blocks: they lie on the host or on NVMe, and are
    brought to the device while they are attended to, unless that is done on the host. Running
    sequences hold them where the device has no room left.

    Freed content stays on the device until its block is needed. Then it goes down: to the host over
    content there, and that to a free rotating block over content there; only from the last tier
    that has blocks is content lost. On each tier the eviction policy says what should stay. What a
    prompt matches comes up to the device if all that its sequence needs has room there. Not
    thread-safe.
    """

    def __init__(
        self,
        num_device_blocks: int,
        num_host_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        num_rotating_blocks: int = 0,
        tenant_share: float = 1.0,
        policy: EvictionPolicy | None = None,
    ) -> None:
        """``tenant_share``: of each tier's blocks, how many cached ones may be of one tenant.
        ``policy`` chooses which of them go; None: those used longest ago."""
        if num_device_blocks < 1 or min(num_host_blocks, num_rotating_blocks) < 0 or block_size < 1:
            raise ValueError(
                f"a pool of {num_device_blocks} device, {num_host_blocks} host and "
                f"{num_rotating_blocks} rotating blocks of {block_size} tokens cannot be; give at "
                "least 1, 0, 0 and 1"
            )
        self.num_device_blocks = num_device_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._policy = policy or LeastRecentlyUsed()
        self._device = TierBlocks(num_device_blocks, tenant_share, self._policy)
        self._rotating = TierBlocks(num_rotating_blocks, tenant_share, self._policy)
        self._host = TierBlocks(num_host_blocks, tenant_share, self._policy)
        self._copies: list[BlockCopy] = []
        self._losses: Counter[int] = Counter()

    @property
    def num_active_blocks(self) -> int:
        """Blocks for running sequences: those on the device and the rotating ones."""
        return self._device.num_blocks + self._rotating.num_blocks

    @property
    def num_host_blocks(self) -> int:
        return self._host.num_blocks

    @property
    def num_free_device_blocks(self) -> int:
        """Device blocks that no sequence holds, those with reusable content included."""
        return self._device.num_free

    @property
    def num_free_active_blocks(self) -> int:
        """The same of device and rotating blocks together."""
        return self._device.num_free + self._rotating.num_free

    @property
    def num_free_host_blocks(self) -> int:
        """Host blocks that no preempted sequence holds, those with reusable content included."""
        return self._host.num_free

    @property
    def num_cached_device_blocks(self) -> int:
        """Device blocks that a prompt could match."""
        return self._device.num_cached

    @property
    def num_cached_rotating_blocks(self) -> int:
        """Rotating blocks that a prompt could match."""
        return self._rotating.num_cached

    @property
    def num_suspect_blocks(self) -> int:
        """Rotating blocks that are dealt out only where no other is free: see `count_losses`."""
        return self._rotating.num_suspect

    @property
    def num_cached_host_blocks(self) -> int:
        """Host blocks that a prompt could match."""
        return self._host.num_cached

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, hashes: Sequence[bytes]) -> tuple[CachedBlock, ...]:
        """The longest run of blocks from the start whose content is cached, each on the highest
        tier that has it.

        Looks only; the answer holds until the pool is next changed.
        """
        matched: list[CachedBlock] = []
        for block_hash in hashes:
            places = self.find(block_hash)
            if not places:
                break
            matched.append(places[0])
        return tuple(matched)

    def expect(self, upcoming: Iterable[Sequence[bytes]]) -> None:
        """Tell the policy what content the requests that run next would match, the next first."""
        self._policy.expect(upcoming)
        for blocks in (self._device, self._rotating, self._host):
            blocks.spare()

    def allocate(self, num_new: int, prefix: Sequence[CachedBlock] = ()) -> list[int] | None:
        """Hold blocks with the content of ``prefix``, then ``num_new`` of undefined content.

        Device blocks of the prefix are shared; those of the host come up, and so do rotating ones
        where the device then still has room for the new blocks, else they are shared, too. What
        came up stays cached below. Returns None, and changes nothing, where too few blocks are
        free.
        """
        shared = [b for tier, b in prefix if tier is Tier.DEVICE]
        from_host = [b for tier, b in prefix if tier is Tier.HOST]
        rotating = [b for b in shared if b >= self.num_device_blocks]
        on_device = (b for b in shared if b < self.num_device_blocks)
        room = self._device.num_free - sum(map(self._is_idle, on_device))
        needed = num_new + len(from_host)
        risen = set(rotating) if needed + len(rotating) <= room else set()
        beyond = self._rotating.num_free - sum(map(self._is_idle, rotating))
        if not risen and needed > room + beyond:
            return None
        for block_id in shared:
            self._hold(block_id)
        for block_id in from_host:  # or making room on the device could overwrite them
            self._host.hold(block_id)
        block_ids = [
            self._promote(block) if block.tier is Tier.HOST or block.block_id in risen else block[1]
            for block in prefix
        ]
        block_ids.extend(self._take() for _ in range(num_new))
        for block_id in reversed(from_host):
            self._host.release(block_id)
        for block_id in reversed(rotating):
            if block_id in risen:
                self._release(block_id)
        return block_ids

    def cache_full_blocks(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make blocks that a sequence holds findable by the hash of their content.

        Call it once the pass that fills them is planned: from then on they may be matched by later
        passes. Does nothing where prefix caching is off.
        """
        if self.enable_prefix_caching:
            for block_id, block_hash in zip(block_ids, hashes, strict=True):
                blocks, place = self._active(block_id)
                blocks.register(place, block_hash)

    def free(self, block_ids: Sequence[int]) -> None:
        """Give back a sequence's blocks, in the order of its table: the last is reused first."""
        for block_id in reversed(block_ids):
            self._release(block_id)

    def swap_out(self, block_ids: Sequence[int]) -> list[int] | None:
        """Move a sequence's blocks to host blocks, which it then holds instead.

        Content that the host has already is held there, not copied again. Returns None, and changes
        nothing, where too few host blocks are free.
        """
        known = [self._host_copy(block_id) for block_id in block_ids]
        num_idle = sum(b is not None and self._host.is_idle(b) for b in known)
        if self._host.num_free - num_idle < known.count(None):
            return None
        for host_id in known:
            if host_id is not None:
                self._host.hold(host_id)
        host_ids = [
            self._demote(block_id, self._hash_of(block_id)) if host_id is None else host_id
            for block_id, host_id in zip(block_ids, known, strict=True)
        ]
        self.free(block_ids)
        return host_ids

    def swap_in(self, host_ids: Sequence[int], num_new: int) -> list[int] | None:
        """Move a sequence's host blocks back to device or rotating blocks, and hold ``num_new``
        more of these.

        Content still on the device is shared, not copied. Returns None, and changes nothing, where
        too few of both are free.
        """
        block_ids = self.allocate(num_new, [self._nearest(host_id) for host_id in host_ids])
        if block_ids is not None:
            self.free_host(host_ids)
        return block_ids

    def free_host(self, host_ids: Sequence[int]) -> None:
        """Give back the host blocks of a preempted sequence."""
        for host_id in reversed(host_ids):
            self._host.release(host_id)

    def find(self, block_hash: bytes) -> list[CachedBlock]:
        """Where that content is cached, the highest tier first: at most one block on each."""
        found = []
        if (block_id := self._device.find(block_hash)) is not None:
            found.append(CachedBlock(Tier.DEVICE, block_id))
        if (block_id := self._host.find(block_hash)) is not None:
            found.append(CachedBlock(Tier.HOST, block_id))
        if (block_id := self._rotating.find(block_hash)) is not None:
            found.append(CachedBlock(Tier.DEVICE, self.num_device_blocks + block_id))
        return found

    def forget(self, lost: Collection[CachedBlock]) -> set[CachedBlock]:
        """No prompt may match the content of ``lost`` blocks any more, nor its copies on other
        tiers. Returns all of them."""
        found = set(lost)
        for block in lost:
            blocks, place = self._blocks_of(block)
            block_hash = blocks.hash_of(place)
            if block_hash is not None:
                found.update(self.find(block_hash))
        for block in found:
            blocks, place = self._blocks_of(block)
            blocks.forget(place)
        return found

    def count_losses(self, lost: Collection[CachedBlock]) -> None:
        """Shards found the content of these blocks lost. A rotating one that they name
        `SUSPECT_LOSSES` times is from then on dealt out last, and caches nothing."""
        for tier, block_id in lost:
            if tier is Tier.DEVICE and block_id >= self.num_device_blocks:
                self._losses[block_id] += 1
                if self._losses[block_id] == SUSPECT_LOSSES:
                    self._rotating.suspect(block_id - self.num_device_blocks)

    def adopt(self, contents: Mapping[int, bytes]) -> None:
        """Rotating blocks, all blank, that hold content from before, oldest use first."""
        for block_id, block_hash in contents.items():
            self._rotating.put(block_id - self.num_device_blocks, block_hash)

    def keep(self, first: int) -> dict[int, bytes]:
        """Bring cached content to the rotating blocks from ``first`` on, what was used last first,
        as far as they have room; nobody may hold a block.

        Returns what they hold, oldest use first.
        """
        start = first - self.num_device_blocks
        free = self._rotating.free_blocks()
        places = [(place, block_hash) for place, block_hash in free if place >= start]
        known: dict[bytes, CachedBlock] = {}
        rising = [(Tier.DEVICE, self.num_device_blocks, self._rotating), (Tier.HOST, 0, self._host)]
        for tier, offset, blocks in (*rising, (Tier.DEVICE, 0, self._device)):
            for place, block_hash in blocks.free_blocks():
                if block_hash is not None:
                    known.pop(block_hash, None)
                    known[block_hash] = CachedBlock(tier, offset + place)
        chosen = list(known.items())[-len(places) :] if places else []
        hashes = {block_hash for block_hash, _ in chosen}
        homes = {block_hash: place for place, block_hash in places if block_hash in hashes}
        targets = (place for place, block_hash in places if block_hash not in hashes)
        for place, _ in free:
            self._rotating.forget(place)
        for block_hash, source in chosen:
            if block_hash not in homes:
                homes[block_hash] = next(targets)
                target = CachedBlock(Tier.DEVICE, self.num_device_blocks + homes[block_hash])
                self._copy(source, target)
            self._rotating.put(homes[block_hash], block_hash)
        return {
            self.num_device_blocks + place: block_hash
            for place, block_hash in self._rotating.free_blocks()
            if block_hash is not None and place >= start
        }

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """The copies ordered since the last call; the caller now owes their execution, in order."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def check_integrity(
        self,
        active_references: Mapping[int, int] | None = None,
        host_references: Mapping[int, int] | None = None,
    ) -> None:
        """Assert that the books are consistent, and how many hold each block, where given."""
        first = self.num_device_blocks
        beyond = None
        if active_references is not None:
            beyond = {b - first: count for b, count in active_references.items() if b >= first}
        self._device.check_integrity(active_references)
        self._rotating.check_integrity(beyond)
        self._host.check_integrity(host_references)

    def _active(self, block_id: int) -> tuple[TierBlocks, int]:
        """The tier that has a block for running sequences, and its place there."""
        if block_id < self.num_device_blocks:
            return self._device, block_id
        return self._rotating, block_id - self.num_device_blocks

    def _blocks_of(self, block: CachedBlock) -> tuple[TierBlocks, int]:
        return (self._host, block.block_id) if block.tier is Tier.HOST else self._active(block[1])

    def _hold(self, block_id: int) -> None:
        blocks, place = self._active(block_id)
        blocks.hold(place)

    def _release(self, block_id: int) -> None:
        blocks, place = self._active(block_id)
        blocks.release(place)

    def _is_idle(self, block_id: int) -> bool:
        blocks, place = self._active(block_id)
        return blocks.is_idle(place)

    def _hash_of(self, block_id: int) -> bytes | None:
        blocks, place = self._active(block_id)
        return blocks.hash_of(place)

    def _take(self) -> int:
        """Hold a free block, of the device if it has one, after saving its content below."""
        if not self._device.num_free:
            place, _ = self._rotating.take()
            return self.num_device_blocks + place
        block_id, lost = self._device.take()
        if lost is not None:
            host_id = self._host.find(lost)
            if host_id is not None:
                self._host.touch(host_id)
            elif self._host.num_free:
                self._host.release(self._demote(block_id, lost))
            else:
                self._sink(CachedBlock(Tier.DEVICE, block_id), lost)
        return block_id

    def _demote(self, block_id: int, block_hash: bytes | None) -> int:
        """Copy a block to a free host block, which is then held."""
        host_id, lost = self._host.take()
        if lost is not None:
            self._sink(CachedBlock(Tier.HOST, host_id), lost)
        self._copy(CachedBlock(Tier.DEVICE, block_id), CachedBlock(Tier.HOST, host_id))
        if block_hash is not None:
            self._host.register(host_id, block_hash)
        return host_id

    def _sink(self, source: CachedBlock, block_hash: bytes) -> None:
        """Keep content that loses its block in a rotating one, if any is free."""
        known = self._rotating.find(block_hash)
        if known is not None:
            self._rotating.touch(known)
        elif self._rotating.num_free:
            place, _ = self._rotating.take()
            self._copy(source, CachedBlock(Tier.DEVICE, self.num_device_blocks + place))
            self._rotating.register(place, block_hash)
            self._rotating.release(place)

    def _promote(self, block: CachedBlock) -> int:
        """Copy a block to a free one for running sequences, which is then held."""
        blocks, place = self._blocks_of(block)
        block_id = self._take()
        self._copy(block, CachedBlock(Tier.DEVICE, block_id))
        block_hash = blocks.hash_of(place)
        if block_hash is not None:
            upper, where = self._active(block_id)
            upper.register(where, block_hash)
        return block_id

    def _copy(self, source: CachedBlock, target: CachedBlock) -> None:
        self._copies.append(
            BlockCopy(
                source=source.tier,
                source_id=source.block_id,
                target=target.tier,
                target_id=target.block_id,
            )
        )

    def _host_copy(self, block_id: int) -> int | None:
        """The host block with the same content as another."""
        block_hash = self._hash_of(block_id)
        return None if block_hash is None else self._host.find(block_hash)

    def _nearest(self, host_id: int) -> CachedBlock:
        """Where the content of a host block is best taken from."""
        block_hash = self._host.hash_of(host_id)
        device_id = None if block_hash is None else self._device.find(block_hash)
        if device_id is None:
            return CachedBlock(Tier.HOST, host_id)
        return CachedBlock(Tier.DEVICE, device_id)
