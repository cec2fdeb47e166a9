"""The bytes of the KV blocks of one shard, on the device and on the host.

Block-major: a block is one contiguous extent that holds all the stage's layers, so moving a block
between tiers is one copy. Each layer sees its keys and values as strided views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch

from kvcache.arena import Arena
from kvcache.block_copy import BlockCopy
from kvcache.block_pool import CachedBlock
from kvcache.kv_codec import codecs
from kvcache.layout import KVLayout, LayerPiece
from kvcache.tier import Tier

KVViews = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer."""


class WholeBlocks(Protocol):
    """Blocks that lie elsewhere (kvcache.kv_rotation.KVRotation)."""

    def tier_of(self, block: int) -> Tier: ...
    def save(
        self,
        blocks: Sequence[int],
        rows: Sequence[torch.Tensor],
        targets: Sequence[CachedBlock],
        *,
        stored: bool,
    ) -> None: ...
    def restore(
        self, rows: Sequence[torch.Tensor], blocks: Sequence[int], *, stored: bool
    ) -> None: ...


class KVStore:
    """Owns the block buffers; the caller decides which block holds what.

    Views per layer have the shape [num_blocks, block_size, heads, dim].
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        device_arena: Arena,
        host_arena: Arena,
        num_device_blocks: int,
        num_host_blocks: int,
        num_adjoining_blocks: int = 0,
    ) -> None:
        """``num_adjoining_blocks`` of the host lie right behind those of a device that is the CPU,
        and count on: they can be attended to as if they were on it. Not with a storage dtype."""
        self.layout = layout
        self.num_device_blocks = num_device_blocks
        self.num_adjoining_blocks = num_adjoining_blocks
        self._codecs = codecs(layout)
        size = layout.block_bytes
        if num_adjoining_blocks:
            assert layout.storage_dtype == "auto" and device_arena.device.type == "cpu"
            near = device_arena.allocate_with(
                num_device_blocks * size, host_arena, num_adjoining_blocks * size
            ).view(-1, size)
        else:
            near = self.allocate(device_arena, num_device_blocks)
        self._blocks = {
            Tier.DEVICE: near,
            Tier.HOST: self.allocate_stored(host_arena, num_host_blocks),
        }
        self._views = {
            spec.layer: layer_views(near, layout.piece(index), layout, index)
            for index, spec in enumerate(layout.layers)
        }
        self._rotation: WholeBlocks | None = None
        self.bytes_copied = Counter({(Tier.DEVICE, Tier.HOST): 0, (Tier.HOST, Tier.DEVICE): 0})

    def allocate(self, arena: Arena, num_blocks: int) -> torch.Tensor:
        """Memory for whole blocks as the device has them, [num_blocks, block_bytes] uint8.

        Raises TierFullError.
        """
        return self._allocate(arena, num_blocks, self.layout.block_bytes)

    def allocate_stored(self, arena: Arena, num_blocks: int) -> torch.Tensor:
        """The same as they lie below the device, [num_blocks, stored_block_bytes]."""
        return self._allocate(arena, num_blocks, self.layout.stored_block_bytes)

    def _allocate(self, arena: Arena, num_blocks: int, size: int) -> torch.Tensor:
        return arena.allocate(num_blocks * size)[: num_blocks * size].view(num_blocks, size)

    @property
    def num_reachable_blocks(self) -> int:
        """Blocks that can be attended to where they lie: the device's and the adjoining ones."""
        return self.num_device_blocks + self.num_adjoining_blocks

    @property
    def device_rows(self) -> torch.Tensor:
        """The device's blocks, [num_device_blocks, block_bytes] uint8."""
        return self._blocks[Tier.DEVICE][: self.num_device_blocks]

    @property
    def adjoining_rows(self) -> torch.Tensor:
        """The adjoining blocks, [num_adjoining_blocks, block_bytes] uint8."""
        return self._blocks[Tier.DEVICE][self.num_device_blocks :]

    def layer(self, layer: int) -> KVViews:
        """The key and value views of ``layer`` over all blocks within reach."""
        return self._views[layer]

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero those of ``blocks`` that lie on the device, where a codec would weigh what was there
        before; the rotation clears its own."""
        if self.layout.storage_dtype != "auto":
            rows = [block for block in blocks if block < self.num_device_blocks]
            self.device_rows[rows] = 0

    def extend(self, rotation: WholeBlocks) -> None:
        """Block ids past the last within reach are ``rotation``'s to move from now on, which knows
        the tier of all past the device's last."""
        self._rotation = rotation

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks between tiers, as if one after the other; in order with what the device
        computes."""
        for (from_rotation, to_rotation, *_), group in groupby(copies, self._kind):
            for run in _distinct(group):
                self._run(from_rotation, to_rotation, run)

    def _kind(self, copy: BlockCopy) -> tuple[bool, bool, Tier, Tier]:
        """Whether source and target are the rotation's to move, and their tiers."""
        first = self.num_reachable_blocks
        return (
            copy.source is Tier.DEVICE and copy.source_id >= first,
            copy.target is Tier.DEVICE and copy.target_id >= first,
            copy.source,
            copy.target,
        )

    def _run(self, from_rotation: bool, to_rotation: bool, copies: list[BlockCopy]) -> None:
        rotation = self._rotation
        for copy in copies:
            source, target = copy.source, copy.target
            if source is Tier.DEVICE and copy.source_id >= self.num_device_blocks:
                assert rotation is not None
                source = rotation.tier_of(copy.source_id)
            if target is Tier.DEVICE and copy.target_id >= self.num_device_blocks:
                assert rotation is not None
                target = rotation.tier_of(copy.target_id)
            self.bytes_copied[source, target] += self.layout.block_bytes
        if from_rotation and to_rotation:
            assert rotation is not None
            row = torch.empty(self.layout.stored_block_bytes, dtype=torch.uint8)
            for copy in copies:
                to = CachedBlock(copy.target, copy.target_id)
                rotation.save([copy.source_id], [row], [to], stored=True)
                rotation.restore([row], [copy.target_id], stored=True)
        elif from_rotation:
            assert rotation is not None
            rows = [self._blocks[copy.target][copy.target_id] for copy in copies]
            targets = [CachedBlock(copy.target, copy.target_id) for copy in copies]
            stored = copies[0].target is Tier.HOST
            rotation.save([copy.source_id for copy in copies], rows, targets, stored=stored)
        elif to_rotation:
            assert rotation is not None
            rows = [self._blocks[copy.source][copy.source_id] for copy in copies]
            stored = copies[0].source is Tier.HOST
            rotation.restore(rows, [copy.target_id for copy in copies], stored=stored)
        else:
            for copy in copies:
                row = self._blocks[copy.source][copy.source_id]
                self._convert(row, self._blocks[copy.target][copy.target_id], copy.target)

    def _convert(self, source: torch.Tensor, target: torch.Tensor, tier: Tier) -> None:
        """Bring a row between device and host, in the form that ``tier``, the target's, has."""
        if source.shape == target.shape:  # as it always is without a storage dtype
            target.copy_(source)
            return
        if tier is Tier.DEVICE:
            source = source.to(target.device)
        device, host = (target, source) if tier is Tier.DEVICE else (source, target)
        whole = torch.empty_like(host, device=device.device)
        for index, codec in enumerate(self._codecs):
            assert codec is not None
            piece, stored = self.layout.piece(index), self.layout.stored_piece(index)
            above = device[None, piece.offset : piece.offset + piece.num_bytes]
            part = slice(stored.offset, stored.offset + stored.num_bytes)
            if tier is Tier.DEVICE:
                codec.decode(host[None, part], above)
            else:
                codec.encode(above, whole[None, part])
        if tier is Tier.HOST:
            target.copy_(whole)


def _distinct(copies: Iterable[BlockCopy]) -> Iterator[list[BlockCopy]]:
    """Runs in which no block comes twice, so that their order does not matter."""
    run: list[BlockCopy] = []
    known: set[CachedBlock] = set()
    for copy in copies:
        ends = CachedBlock(copy.source, copy.source_id), CachedBlock(copy.target, copy.target_id)
        if not known.isdisjoint(ends):
            yield run
            run, known = [], set()
        run.append(copy)
        known.update(ends)
    if run:
        yield run


def layer_views(
    rows: torch.Tensor, piece: LayerPiece, layout: KVLayout, index: int, at: int | None = None
) -> KVViews:
    """Keys and values of the ``index``-th layer in ``rows`` [N, bytes], where ``piece`` lies at its
    offset, or ``at`` another: [N, block_size, heads, dim] each."""
    spec = layout.layers[index]
    dtype = getattr(torch, layout.dtype)
    start = piece.offset if at is None else at
    middle, stop = start + piece.key_bytes, start + piece.num_bytes
    size = layout.block_size
    keys = rows[:, start:middle].view(dtype).view(-1, size, spec.key_heads, spec.key_dim)
    values = rows[:, middle:stop].view(dtype).view(-1, size, spec.value_heads, spec.value_dim)
    return keys, values


def write_tokens(
    views: KVViews,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Store one token's keys and values at each (block, offset)."""
    views[0].index_put_((block_ids, offsets), key_THD)
    views[1].index_put_((block_ids, offsets), value_THD)
