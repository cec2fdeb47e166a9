"""A small rotation over three tiers, and passes through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kvcache.arena import Arena
from kvcache.block_copy import BlockCopy
from kvcache.kv_rotation import KVRotation
from kvcache.kv_store import KVStore
from kvcache.layout import KVLayerSpec, KVLayout
from kvcache.micro_batch import BlockUse, deal
from kvcache.tier import Tier

LAYOUT = KVLayout(
    layers=tuple(
        KVLayerSpec(layer=layer, key_heads=2, key_dim=dim, value_heads=1, value_dim=4)
        for layer, dim in ((3, 8), (4, 520), (6, 3))
    ),
    block_size=4,
    dtype="float32",
)
SIZE = LAYOUT.block_size
DEVICE, HOST, NVME, SLOTS = 3, 4, 6, 5
TOTAL = DEVICE + HOST + NVME


@contextmanager
def rotation(
    folder: Path,
    num_tail_blocks: int = 0,
    storage_dtype: str = "auto",
    kept_as: str | None = None,
) -> Iterator[tuple[KVStore, KVRotation]]:
    device = Arena(Tier.DEVICE, 1 << 22)
    host = Arena(Tier.HOST, 1 << 20)
    layout = replace(LAYOUT, storage_dtype=storage_dtype)
    store = KVStore(
        layout, device_arena=device, host_arena=host, num_device_blocks=DEVICE, num_host_blocks=2
    )
    rotating = KVRotation(
        store,
        num_host_blocks=HOST,
        num_nvme_blocks=NVME,
        num_slots=SLOTS,
        num_tail_blocks=num_tail_blocks,
        device_arena=device,
        host_arena=host,
        folder=folder / "kv",
        kept_as=kept_as,
    )
    store.extend(rotating)
    try:
        yield store, rotating
    finally:
        rotating.close()
        device.check_integrity()
        host.check_integrity()


def copy_of(source: Tier, source_id: int, target: Tier, target_id: int) -> BlockCopy:
    return BlockCopy(source=source, source_id=source_id, target=target, target_id=target_id)


class Step(NamedTuple):
    """What one sequence does in a pass: it adds ``added`` tokens, the last of which leaves ``room``
    in the last of ``block_ids``; or as many as there is place for."""

    block_ids: tuple[int, ...]
    added: int
    room: int

    @property
    def use(self) -> BlockUse:
        end = len(self.block_ids) * SIZE - self.room
        tokens = range(max(0, end - self.added), end)
        return BlockUse(block_ids=self.block_ids, tokens=tokens, block_size=SIZE)


def run_pass(rotating: KVRotation, steps: Sequence[tuple[Step, float]]) -> dict[int, set[float]]:
    """Each sequence adds tokens of one value. Returns, by block, what it held in its first place
    before."""
    held: dict[int, set[float]] = {}
    uses = {index: step.use for index, (step, _) in enumerate(steps)}
    values = {block: value for step, value in steps for block in step.block_ids}
    (micro_batch,) = deal(uses, SLOTS)
    rotating.begin([micro_batch])
    for spec in LAYOUT.layers:
        views = rotating.take(spec.layer)
        for slot, block in enumerate(micro_batch.blocks[: micro_batch.num_loaded]):
            for view in views:
                held.setdefault(block, set()).update(view[slot, 0].flatten().tolist())
        for slot, places in micro_batch.written.items():
            for view in views:
                view[slot, places.start : places.stop] = values[micro_batch.blocks[slot]]
        rotating.put_back()
    rotating.end()
    return held
