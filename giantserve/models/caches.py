"""The cache objects that transformers' modules write their keys and values to."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from giantserve.models.attention import gather
from giantserve.models.batch import PassBatch
from kvcache.kv_store import KVStore


class PassThroughCache(Cache):  # type: ignore[misc]
    """Hands keys and values on untouched: the attention function stores them."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        length = query_length.shape[0] if torch.is_tensor(query_length) else query_length
        return int(length) + self.get_seq_length(), 0

    @property
    def is_compileable(self) -> bool:
        return False


class GatheringCache(PassThroughCache):
    """Stores what it is given and returns the whole contexts of the pass's sequences, one after the
    other.

    For models that cache something else than they attend to (MLA), and for those that attend by
    themselves, one sequence a call. Tensors are [1, heads, tokens, dim].
    """

    def __init__(self, kv: KVStore, batch: PassBatch) -> None:
        super().__init__()
        self._kv = kv
        self._batch = batch

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._batch
        self._kv.write(
            layer_idx,
            key_states[0].transpose(0, 1),
            value_states[0].transpose(0, 1),
            batch.block_ids,
            batch.offsets,
        )
        contexts = [
            torch.cat(
                [
                    gather(blocks, chunk.table, chunk.start + chunk.length)
                    for chunk in batch.all_chunks()
                ],
                dim=1,
            ).unsqueeze(0)
            for blocks in self._kv.layer(layer_idx)
        ]
        return contexts[0], contexts[1]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        chunks = self._batch.all_chunks()
        return chunks[0].start if len(chunks) == 1 else 0
