"""How the bytes of a KV block lie: block-major, one contiguous extent of all the stage's layers."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STORAGE_DTYPES = ("auto", "int8", "fp8")
"""How KV lies below the device: as it is, or in one byte an element with a scale for each head of a
block."""

SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayerSpec:
    """What one layer caches per token. Keys and values may differ (MLA caches a latent and a rope
    key)."""

    layer: int
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPiece:
    """One layer's part of a block: its keys from byte ``offset`` on, its values right after
    them."""

    offset: int
    key_bytes: int
    value_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.key_bytes + self.value_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPiece:
    """One layer's part of a block as it lies below the device."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The layout of one block of one stage, as one shard holds it (heads already dealt to the
    shard). ``storage_dtype`` is how it lies below the device."""

    layers: tuple[KVLayerSpec, ...]
    block_size: int
    dtype: str
    storage_dtype: str = "auto"

    @property
    def bytes_per_token(self) -> int:
        return DTYPE_BYTES[self.dtype] * sum(spec.elements_per_token for spec in self.layers)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    def stored_piece(self, layer: int) -> StoredPiece:
        """The same below the device: the elements, then a scale for each head of the keys and the
        values."""
        sizes = [self._stored_bytes(spec) for spec in self.layers]
        return StoredPiece(offset=sum(sizes[:layer]), num_bytes=sizes[layer])

    @property
    def stored_block_bytes(self) -> int:
        return sum(self._stored_bytes(spec) for spec in self.layers)

    def _stored_bytes(self, spec: KVLayerSpec) -> int:
        elements = self.block_size * spec.elements_per_token
        if self.storage_dtype == "auto":
            return elements * DTYPE_BYTES[self.dtype]
        scales = SCALE_BYTES * (spec.key_heads + spec.value_heads)
        return -(-(elements + scales) // 8) * 8

    def piece(self, layer: int) -> LayerPiece:
        """Where the part of the stage's ``layer``-th layer lies in a block."""
        element = DTYPE_BYTES[self.dtype] * self.block_size
        sizes = [element * spec.elements_per_token for spec in self.layers]
        spec = self.layers[layer]
        return LayerPiece(
            offset=sum(sizes[:layer]),
            key_bytes=element * spec.key_heads * spec.key_dim,
            value_bytes=element * spec.value_heads * spec.value_dim,
        )
