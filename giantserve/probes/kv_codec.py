"""How fast a device converts KV between its dtypes."""

from __future__ import annotations

import torch

from giantserve.probes.timing import seconds_of
from kvcache.kv_codec import KVCodec
from kvcache.layout import DTYPE_BYTES, STORAGE_DTYPES, KVLayerSpec, KVLayout
from partition.bandwidths import CodecRate

SPEC = KVLayerSpec(layer=0, key_heads=8, key_dim=128, value_heads=8, value_dim=128)
BLOCK_SIZE, NUM_BLOCKS = 16, 256


def probe_kv_codecs(device: str, dtype: str) -> tuple[CodecRate, ...]:
    """The storage dtypes that lose accuracy, a micro-batch's blocks at a time. Takes about 1 s."""
    return tuple(_rate(device, dtype, name) for name in STORAGE_DTYPES if name != "auto")


def _rate(device: str, dtype: str, storage_dtype: str) -> CodecRate:
    layout = KVLayout(
        layers=(SPEC,), block_size=BLOCK_SIZE, dtype=dtype, storage_dtype=storage_dtype
    )
    codec = KVCodec(layout, 0)
    held = torch.ones(NUM_BLOCKS, layout.block_bytes // DTYPE_BYTES[dtype], device=device)
    pieces = held.to(getattr(torch, dtype)).view(torch.uint8)
    stored = torch.empty(NUM_BLOCKS, layout.stored_block_bytes, dtype=torch.uint8, device=device)
    encode_s = seconds_of(lambda: codec.encode(pieces, stored), device)
    decode_s = seconds_of(lambda: codec.decode(stored, pieces), device)
    return CodecRate(
        storage_dtype=storage_dtype,
        encode=pieces.nbytes / encode_s,
        decode=pieces.nbytes / decode_s,
    )
