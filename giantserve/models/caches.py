"""The cache objects that transformers' modules write their keys and values to."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from giantserve.models.attention import gather
from giantserve.models.pass_kv import PassKV
from kvcache.kv_store import write_tokens


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

    def __init__(self, kv: PassKV) -> None:
        super().__init__()
        self._kv = kv

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key_THD, value_THD = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        contexts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for part, views in self._kv.parts(layer_idx):
            where = part.batch.block_ids, part.batch.offsets
            write_tokens(views, part.of(key_THD), part.of(value_THD), *where)
            for chunk in part.batch.all_chunks():
                length = chunk.start + chunk.length
                keys, values = (
                    gather(blocks, chunk.table, length).to(key_THD.device) for blocks in views
                )
                contexts[part.first_row(chunk.row)] = keys, values
        in_order = [contexts[row] for row in sorted(contexts)]
        keys, values = (torch.cat(tensors, dim=1) for tensors in zip(*in_order, strict=True))
        return keys.unsqueeze(0), values.unsqueeze(0)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        chunks = self._kv.batch.all_chunks()
        return chunks[0].start if len(chunks) == 1 else 0
