"""Attention over block tables in one FlashAttention kernel, on CUDA.

Shapes: T tokens, H query heads, K KV heads, D head dim, N blocks, S block size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from giantserve.models.attention import AttentionOptions
    from giantserve.models.batch import PassBatch

PAGE_MULTIPLE = 256
"""What FlashAttention 2 asks of a block size; `giantserve.planning` chooses it on CUDA."""

HEAD_DIM_MULTIPLE, HEAD_DIM_LIMIT = 8, 256


def can_attend(
    query_THD: torch.Tensor, values_NSKD: torch.Tensor, options: AttentionOptions
) -> bool:
    """Whether the kernel computes this attention: plain, half precision, equal head dims."""
    dim = query_THD.shape[-1]
    return (
        query_THD.device.type == "cuda"
        and query_THD.dtype in (torch.float16, torch.bfloat16)
        and options.plain
        and values_NSKD.shape[-1] == dim
        and values_NSKD.shape[1] % PAGE_MULTIPLE == 0
        and dim % HEAD_DIM_MULTIPLE == 0
        and dim <= HEAD_DIM_LIMIT
    )


def attend_batch(
    query_THD: torch.Tensor,
    keys_NSKD: torch.Tensor,
    values_NSKD: torch.Tensor,
    batch: PassBatch,
    options: AttentionOptions,
) -> torch.Tensor:
    """Every sequence of the pass at once, each causally over its own blocks. Returns [T, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    tables = batch.tables
    left = -1 if options.window is None else options.window - 1
    out = varlen_attn(
        query_THD,
        keys_NSKD,
        values_NSKD,
        tables.query_starts,
        None,
        tables.longest_query,
        tables.longest_context,
        scale=options.scaling,
        window_size=(left, 0),
        enable_gqa=query_THD.shape[1] != keys_NSKD.shape[2],
        seqused_k=tables.contexts,
        block_table=tables.blocks,
    )
    assert isinstance(out, torch.Tensor)
    return out
