"""One pass over sequences whose KV lies in different places: the same attention everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from giantserve.models.attention import PagedAttention
from giantserve.models.batch import ChunkSpec
from giantserve.models.pass_kv import PassKV, rotating
from kvcache.arena import Arena
from kvcache.kv_rotation import KVRotation
from kvcache.kv_store import KVStore
from kvcache.layout import KVLayerSpec, KVLayout
from kvcache.tier import Tier
from kvcache.transfer_stats import Link

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 8, 4
DEVICE, HOST, NVME = 4, 6, 5
LAYOUT = KVLayout(
    layers=tuple(
        KVLayerSpec(layer=layer, key_heads=KV_HEADS, key_dim=DIM, value_heads=KV_HEADS, value_dim=8)
        for layer in range(2)
    ),
    block_size=SIZE,
    dtype="float32",
)
BLOCKS = {
    "device": [0, 1, 2],
    "host": [4, 5, 6],
    "device and host": [3, 7, 8],
    "NVMe": [10, 11, 12],
    "host and NVMe": [9, 13, 14],
}
PASSES = [{name: len(name) % 3 + 5 for name in BLOCKS}, *[dict.fromkeys(BLOCKS, 1)] * 4]
"""New tokens by sequence."""


@contextmanager
def kv_of(where: str, folder: Path) -> Iterator[tuple[KVStore, KVRotation | None]]:
    """``where``: all blocks on the device, or those of the host adjoining it or attended to there
    or rotating."""
    device, host = Arena(Tier.DEVICE, 1 << 20), Arena(Tier.HOST, 1 << 20)
    near = DEVICE + HOST + NVME if where == "all on the device" else DEVICE
    store = KVStore(
        LAYOUT,
        device_arena=device,
        host_arena=host,
        num_device_blocks=near,
        num_host_blocks=0,
        num_adjoining_blocks=HOST if where == "adjoining" else 0,
    )
    if near > DEVICE:
        yield store, None
        return
    rotation = KVRotation(
        store,
        num_host_blocks=HOST,
        num_nvme_blocks=NVME,
        num_slots=8,
        attends_on_host=where != "rotating",
        device_arena=device,
        host_arena=host,
        folder=folder / where,
    )
    store.extend(rotation)
    try:
        yield store, rotation
    finally:
        rotation.close()
        device.check_integrity()
        host.check_integrity()


def attended(
    store: KVStore, rotation: KVRotation | None, sinks: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """What each layer of each pass gives for the same tokens, whatever the store."""
    generator = torch.Generator().manual_seed(0)
    attention, module = PagedAttention(), torch.nn.Module()
    starts = dict.fromkeys(BLOCKS, 0)
    for added in PASSES:
        specs = []
        for index, (name, length) in enumerate(added.items()):
            used = -(-(starts[name] + length) // SIZE)
            blocks = BLOCKS[name][:used]
            specs.append(
                ChunkSpec(seq_id=index, start=starts[name], length=length, block_ids=blocks)
            )
            starts[name] += length
        attention.kv = PassKV(store, rotation, specs, SIZE, torch.device("cpu"))
        tokens = sum(added.values())
        with torch.inference_mode(), rotating(rotation, [attention.kv]):
            for layer in range(len(LAYOUT.layers)):
                module.layer_idx = layer  # type: ignore[assignment]
                query, key, value = (
                    torch.randn(1, heads, tokens, DIM, generator=generator)
                    for heads in (HEADS, KV_HEADS, KV_HEADS)
                )
                yield attention(module, query, key, value, s_aux=sinks)[0]


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_attention_is_the_same_wherever_blocks_lie(
    sinks: torch.Tensor | None, tmp_path: Path
) -> None:
    from_host = []
    with kv_of("all on the device", tmp_path) as (store, _):
        expected = list(attended(store, None, sinks))
    for where in ("adjoining", "attended to there", "rotating"):
        with kv_of(where, tmp_path) as (store, rotation):
            for found, wanted in zip(attended(store, rotation, sinks), expected, strict=True):
                torch.testing.assert_close(found, wanted)
            assert rotation is not None and rotation.take_lost() == ()
            from_host.append(
                rotation.transfers.snapshot()[Link("kv", Tier.HOST, Tier.DEVICE)].num_bytes
            )
    # what is shared with NVMe alone; also what is shared with the device; all
    assert 0 < from_host[0] < from_host[1] < from_host[2]
