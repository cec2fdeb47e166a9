"""The bytes of the KV blocks of one shard, on the device and on the host.

Block-major: a block is one contiguous extent that holds all the stage's layers, so moving a block
between tiers is one copy. Each layer sees its keys and values as strided views.
"""

from __future__ import annotations

import torch

from kvcache.arena import Arena
from kvcache.layout import KVLayout
from kvcache.tier import Tier


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
    ) -> None:
        self.layout = layout
        self._dtype = getattr(torch, layout.dtype)
        self._blocks = {
            Tier.DEVICE: self._allocate(device_arena, num_device_blocks),
            Tier.HOST: self._allocate(host_arena, num_host_blocks),
        }
        self._views = self._layer_views(self._blocks[Tier.DEVICE])
        self.bytes_copied = {(Tier.DEVICE, Tier.HOST): 0, (Tier.HOST, Tier.DEVICE): 0}

    def _allocate(self, arena: Arena, num_blocks: int) -> torch.Tensor:
        flat = arena.allocate(num_blocks * self.layout.block_bytes)
        size = self.layout.block_bytes
        return flat[: num_blocks * size].view(num_blocks, size)

    def _layer_views(self, blocks: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        elements = blocks.view(self._dtype)
        size, offset = self.layout.block_size, 0
        for spec in self.layout.layers:
            pair = []
            for heads, dim in ((spec.key_heads, spec.key_dim), (spec.value_heads, spec.value_dim)):
                extent = size * heads * dim
                part = elements[:, offset : offset + extent]
                pair.append(part.view(-1, size, heads, dim))
                offset += extent
            views[spec.layer] = (pair[0], pair[1])
        return views

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The key and value views of ``layer`` over all device blocks."""
        return self._views[layer]

    def write(
        self,
        layer: int,
        key_THD: torch.Tensor,
        value_THD: torch.Tensor,
        block_ids: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Store one token's keys and values at each (block, offset)."""
        keys, values = self._views[layer]
        keys.index_put_((block_ids, offsets), key_THD)
        values.index_put_((block_ids, offsets), value_THD)

    def copy(self, source: Tier, source_id: int, target: Tier, target_id: int) -> None:
        """Copy one block between tiers; in order with what the device computes."""
        self._blocks[target][target_id].copy_(self._blocks[source][source_id])
        self.bytes_copied[source, target] += self.layout.block_bytes
