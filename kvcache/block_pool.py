"""KV block bookkeeping over the tiers. Moves no bytes: it orders copies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from kvcache.block_copy import BlockCopy
from kvcache.tier import Tier
from kvcache.tier_blocks import TierBlocks


class CachedBlock(NamedTuple):
    """Where the content of one matched block lies."""

    tier: Tier
    block_id: int


class BlockPool:
    """Deals out device and host KV blocks and keeps finished content findable for later prompts.

    The bytes lie elsewhere: whatever must move is queued as a `BlockCopy`, and `take_copies` hands
    the queue over. Its order matters: the holder of the bytes runs all copies in order, before any
    write to blocks allocated since the previous hand-over, and after all earlier writes.

    Freed content stays on the device until its block is needed; then it is demoted to the host
    (over the host's own least recently used content), and lost only where every host block is held.
    Ids past the last device block name *rotating* blocks: they lie on the host or on NVMe and come
    to the device while they are attended to. In all else they are device blocks, dealt out when no
    blank one is left. Not thread-safe.
    """

    def __init__(
        self,
        num_device_blocks: int,
        num_host_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        num_rotating_blocks: int = 0,
    ) -> None:
        if num_device_blocks < 1 or min(num_host_blocks, num_rotating_blocks) < 0 or block_size < 1:
            raise ValueError(
                f"a pool of {num_device_blocks} device, {num_host_blocks} host and "
                f"{num_rotating_blocks} rotating blocks of {block_size} tokens cannot be; give at "
                "least 1, 0, 0 and 1"
            )
        self.num_device_blocks = num_device_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._device = TierBlocks(num_device_blocks + num_rotating_blocks, num_device_blocks)
        self._host = TierBlocks(num_host_blocks)
        self._copies: list[BlockCopy] = []

    @property
    def num_active_blocks(self) -> int:
        """Blocks for running sequences: those on the device and the rotating ones."""
        return self._device.num_blocks

    @property
    def num_host_blocks(self) -> int:
        return self._host.num_blocks

    @property
    def num_free_device_blocks(self) -> int:
        """Device blocks that no sequence holds, those with reusable content included."""
        return self._device.num_free_preferred

    @property
    def num_free_active_blocks(self) -> int:
        """The same of device and rotating blocks together."""
        return self._device.num_free

    @property
    def num_free_host_blocks(self) -> int:
        """Host blocks that no preempted sequence holds, those with reusable content included."""
        return self._host.num_free

    @property
    def num_cached_device_blocks(self) -> int:
        """Device blocks that a prompt could match."""
        return self._device.num_cached

    @property
    def num_cached_host_blocks(self) -> int:
        """Host blocks that a prompt could match."""
        return self._host.num_cached

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, hashes: Sequence[bytes]) -> tuple[CachedBlock, ...]:
        """The longest run of blocks from the start whose content is cached, the device preferred.

        Looks only; the answer holds until the pool is next changed.
        """
        matched: list[CachedBlock] = []
        for block_hash in hashes:
            if (device_id := self._device.find(block_hash)) is not None:
                matched.append(CachedBlock(Tier.DEVICE, device_id))
            elif (host_id := self._host.find(block_hash)) is not None:
                matched.append(CachedBlock(Tier.HOST, host_id))
            else:
                break
        return tuple(matched)

    def allocate(self, num_new: int, prefix: Sequence[CachedBlock] = ()) -> list[int] | None:
        """Hold device blocks with the content of ``prefix``, then ``num_new`` of undefined content.

        Device blocks of the prefix are shared, host blocks are promoted into new device blocks (and
        stay cached on the host). Returns None, and changes nothing, where too few blocks are free.
        """
        shared = [b for tier, b in prefix if tier is Tier.DEVICE]
        promoted = [b for tier, b in prefix if tier is Tier.HOST]
        num_idle = sum(self._device.is_idle(b) for b in shared)
        if self._device.num_free - num_idle < len(promoted) + num_new:
            return None
        for block_id in shared:
            self._device.hold(block_id)
        for block_id in promoted:  # or making room on the device could overwrite them
            self._host.hold(block_id)
        block_ids = [b if tier is Tier.DEVICE else self._promote(b) for tier, b in prefix]
        block_ids.extend(self._take_device() for _ in range(num_new))
        for block_id in reversed(promoted):
            self._host.release(block_id)
        return block_ids

    def cache_full_blocks(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make held device blocks findable by the hash of their content.

        Call it once the pass that fills them is planned: from then on they may be matched by later
        passes. Does nothing where prefix caching is off.
        """
        if self.enable_prefix_caching:
            for block_id, block_hash in zip(block_ids, hashes, strict=True):
                self._device.register(block_id, block_hash)

    def free(self, block_ids: Sequence[int]) -> None:
        """Give back device blocks, in the order of a sequence's table: the last is reused first."""
        for block_id in reversed(block_ids):
            self._device.release(block_id)

    def swap_out(self, block_ids: Sequence[int]) -> list[int] | None:
        """Move a sequence's device blocks to host blocks, which it then holds instead.

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
            self._demote(block_id, self._device.hash_of(block_id)) if host_id is None else host_id
            for block_id, host_id in zip(block_ids, known, strict=True)
        ]
        self.free(block_ids)
        return host_ids

    def swap_in(self, host_ids: Sequence[int], num_new: int) -> list[int] | None:
        """Move a sequence's host blocks back to the device, and hold ``num_new`` more blocks there.

        Content still on the device is shared, not copied. Returns None, and changes nothing, where
        too few device blocks are free.
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
        """Where that content is cached: at most one block on each tier."""
        places = ((Tier.DEVICE, self._device), (Tier.HOST, self._host))
        found = ((tier, blocks.find(block_hash)) for tier, blocks in places)
        return [CachedBlock(tier, block_id) for tier, block_id in found if block_id is not None]

    def forget(self, lost: Collection[CachedBlock]) -> set[CachedBlock]:
        """No prompt may match the content of ``lost`` blocks any more, nor its copy on the other
        tier. Returns all of them."""
        found = set(lost)
        for tier, block_id in lost:
            block_hash = (self._device if tier is Tier.DEVICE else self._host).hash_of(block_id)
            if block_hash is not None:
                found.update(self.find(block_hash))
        for tier, block_id in found:
            (self._device if tier is Tier.DEVICE else self._host).forget(block_id)
        return found

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """The copies ordered since the last call; the caller now owes their execution, in order."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def check_integrity(
        self,
        device_references: Mapping[int, int] | None = None,
        host_references: Mapping[int, int] | None = None,
    ) -> None:
        """Assert that the books are consistent, and how many hold each block, where given."""
        self._device.check_integrity(device_references)
        self._host.check_integrity(host_references)

    def _take_device(self) -> int:
        """Hold a free device block, after saving its content on the host where that is possible."""
        block_id, lost = self._device.take()
        if lost is not None:
            host_id = self._host.find(lost)
            if host_id is not None:
                self._host.touch(host_id)
            elif self._host.num_free:
                self._host.release(self._demote(block_id, lost))
        return block_id

    def _demote(self, block_id: int, block_hash: bytes | None) -> int:
        """Copy a device block to a free host block, which is then held."""
        host_id, _ = self._host.take()
        self._copies.append(
            BlockCopy(source=Tier.DEVICE, source_id=block_id, target=Tier.HOST, target_id=host_id)
        )
        if block_hash is not None:
            self._host.register(host_id, block_hash)
        return host_id

    def _promote(self, host_id: int) -> int:
        """Copy a host block to a free device block, which is then held."""
        block_id = self._take_device()
        self._copies.append(
            BlockCopy(source=Tier.HOST, source_id=host_id, target=Tier.DEVICE, target_id=block_id)
        )
        block_hash = self._host.hash_of(host_id)
        if block_hash is not None:
            self._device.register(block_id, block_hash)
        return block_id

    def _host_copy(self, block_id: int) -> int | None:
        """The host block with the same content as a device block."""
        block_hash = self._device.hash_of(block_id)
        return None if block_hash is None else self._host.find(block_hash)

    def _nearest(self, host_id: int) -> CachedBlock:
        """Where the content of a host block is best taken from."""
        block_hash = self._host.hash_of(host_id)
        device_id = None if block_hash is None else self._device.find(block_hash)
        if device_id is None:
            return CachedBlock(Tier.HOST, host_id)
        return CachedBlock(Tier.DEVICE, device_id)
