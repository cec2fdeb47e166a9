"""The KV of a pass: what stays on the device, and what passes through it micro-batch by
micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from giantserve.models.batch import ChunkSpec, PassBatch, build_batch
from kvcache.kv_rotation import KVRotation
from kvcache.kv_store import KVStore, KVViews
from kvcache.micro_batch import BlockUse, MicroBatch, deal


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPart:
    """Sequences whose blocks are in one place together, where ``batch`` lies, too. Its tokens are
    the rows ``rows`` of the pass (None: the part is the whole pass). ``in_place``: it counts rows
    as the pass does; else from 0, row i of it being row ``rows[i]`` of the pass."""

    rows: torch.Tensor | None
    batch: PassBatch
    in_place: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's rows of a tensor whose first dimension are the rows of the pass, where its
        blocks are."""
        home = self.batch.positions.device
        return tensor if self.rows is None else tensor[self.rows].to(home)

    def first_row(self, row: int) -> int:
        """Where a row of the part stands in the pass."""
        return row if self.rows is None or self.in_place else int(self.rows[row])


class PassKV:
    """For each layer, the parts of one pass with the keys and values that they attend to."""

    def __init__(
        self,
        kv: KVStore,
        rotation: KVRotation | None,
        specs: Sequence[ChunkSpec],
        block_size: int,
        device: torch.device,
        *,
        gathered: bool = False,
    ) -> None:
        """For `rotating`, within which alone `parts` works. Blocks that the pass begins, and leaves
        room in, are cleared."""
        self._kv, self._rotation = kv, rotation
        written = (item for spec in specs for item in _use(spec, block_size).written)
        kv.clear(block for block, at in written if at.start == 0 and at.stop < block_size)
        self.micro_batches: tuple[MicroBatch, ...] = ()
        self.batch = build_batch(specs, block_size, device, gathered=gathered)
        self._resident: PassPart | None = PassPart(rows=None, batch=self.batch, in_place=True)
        self._on_host: PassPart | None = None
        self._rotated: list[PassPart] = []
        if rotation is None:
            return
        outside = {
            position: use
            for position, spec in enumerate(specs)
            if max((use := _use(spec, block_size)).block_ids) >= kv.num_reachable_blocks
        }
        if not outside:
            return
        starts = [0]
        for spec in specs:
            starts.append(starts[-1] + spec.length)

        def part(
            positions: Sequence[int], chosen: Sequence[ChunkSpec], home: torch.device = device
        ) -> PassPart:
            rows = [row for p in positions for row in range(starts[p], starts[p + 1])]
            # on CUDA one kernel takes all rows of a part, so they have to lie together
            in_place = device.type == "cpu"
            first_rows = [starts[p] for p in positions] if in_place else None
            return PassPart(
                rows=torch.tensor(rows, device=device),
                batch=build_batch(
                    chosen, block_size, home, gathered=gathered, first_rows=first_rows
                ),
                in_place=in_place,
            )

        stays = [position for position in range(len(specs)) if position not in outside]
        self._resident = part(stays, [specs[p] for p in stays]) if stays else None
        if on_host := [p for p, use in outside.items() if _is_attended_on_host(use, rotation)]:
            first = rotation.first_host
            moved = [
                replace(specs[p], block_ids=[block - first for block in outside.pop(p).block_ids])
                for p in on_host
            ]
            self._on_host = part(on_host, moved, torch.device("cpu"))
        self.micro_batches = deal(outside, rotation.num_slots)
        for micro_batch in self.micro_batches:
            slots = micro_batch.slots
            moved = [
                replace(specs[p], block_ids=[slots[block] for block in outside[p].block_ids])
                for p in micro_batch.members
            ]
            self._rotated.append(part(micro_batch.members, moved))

    def parts(self, layer: int) -> Iterator[tuple[PassPart, KVViews]]:
        """Each part with its keys and values, [blocks, block_size, heads, dim] each, as the block
        tables of the part's batch count them. They are valid, and writable, until the next part is
        asked for."""
        if self._resident is not None:
            yield self._resident, self._kv.layer(layer)
        if self._on_host is not None:
            assert self._rotation is not None
            yield self._on_host, self._rotation.host_views(layer)
        for part in self._rotated:
            assert self._rotation is not None
            yield part, self._rotation.take(layer)
            self._rotation.put_back()


def _is_attended_on_host(use: BlockUse, rotation: KVRotation) -> bool:
    blocks = use.block_ids
    within = rotation.first_host <= min(blocks) and max(blocks) < rotation.first_nvme
    return rotation.attends_on_host and within


@contextmanager
def rotating(rotation: KVRotation | None, slices: Sequence[PassKV]) -> Iterator[None]:
    """A pass whose slices go through each layer in this order. The first reads start here."""
    micro_batches = [each for kv in slices for each in kv.micro_batches]
    if rotation is None or not micro_batches:
        yield
        return
    rotation.begin(micro_batches)
    try:
        yield
    finally:
        rotation.end()


def _use(spec: ChunkSpec, block_size: int) -> BlockUse:
    used = -(-(spec.start + spec.length) // block_size)
    return BlockUse(
        block_ids=tuple(spec.block_ids[:used]),
        tokens=range(spec.start, spec.start + spec.length),
        block_size=block_size,
    )
