"""Decode attention on a CPU by the compiled kernel of ``native/paged_attention.cpp``.

Where it could not be built, decodes are attended to by torch
(`giantserve.models.attention.attend_decodes`), at a quarter to a third of the speed.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from giantserve.models.native_library import KernelUnavailableError, load_kernels

if TYPE_CHECKING:
    from giantserve.models.attention import AttentionOptions
    from giantserve.models.batch import DecodeGroup

_DTYPES = (torch.bfloat16, torch.float32)


class _Attention(ctypes.Structure):
    """``struct Attention`` of the kernel: addresses, then sizes; strides in elements."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("out", "query", "keys", "values", "rows", "tables", "lengths", "sinks")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("num_sequences", "table_width", "num_heads", "kv_heads"),
                *("key_dim", "value_dim", "block_size"),
                *("query_row_stride", "query_head_stride"),
                *("key_block_stride", "key_token_stride"),
                *("value_block_stride", "value_token_stride"),
                "window",
            )
        ),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class NativeAttention:
    """Attention of one query a sequence over its blocks, read where they lie.

    Computes in fp32; a sequence's bits depend on its own query and context alone, not on what it
    shares a pass with. Runs on torch's own threads, and as many of them as torch uses.
    """

    def __init__(self, level: int | None = None) -> None:
        """``level`` is that of `load_kernels`. Raises KernelUnavailableError."""
        library, self.level = load_kernels(level)
        assert library.attention_bytes() == ctypes.sizeof(_Attention)
        self._attend = library.attend_decodes
        task = ctypes.POINTER(_Attention)
        self._attend.argtypes = (task, ctypes.c_int, ctypes.c_bool, ctypes.c_int)
        self._attend.restype = None

    def can_attend(
        self, query_THD: torch.Tensor, keys_NSKD: torch.Tensor, values_NSKD: torch.Tensor
    ) -> bool:
        """Whether these are in memory, of a dtype it knows, and of even head dims that lie
        together."""
        tensors = (query_THD, keys_NSKD, values_NSKD)
        return (
            query_THD.dtype in _DTYPES
            and all(each.device.type == "cpu" and each.dtype is query_THD.dtype for each in tensors)
            and all(each.shape[-1] % 2 == 0 and each.stride(-1) == 1 for each in tensors)
            and all(each.stride(-2) == each.shape[-1] for each in (keys_NSKD, values_NSKD))
        )

    def attend(
        self,
        query_THD: torch.Tensor,
        keys_NSKD: torch.Tensor,
        values_NSKD: torch.Tensor,
        group: DecodeGroup,
        options: AttentionOptions,
        out_THD: torch.Tensor,
    ) -> None:
        """Of ``group``'s rows of ``query``, into the same rows of ``out``, which is contiguous."""
        assert out_THD.is_contiguous() and out_THD.dtype is query_THD.dtype
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        tables = group.tables.contiguous()
        task = _Attention(
            out=out_THD.data_ptr(),
            query=query_THD.data_ptr(),
            keys=keys_NSKD.data_ptr(),
            values=values_NSKD.data_ptr(),
            rows=group.rows.data_ptr(),
            tables=tables.data_ptr(),
            lengths=group.lengths.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            num_sequences=tables.shape[0],
            table_width=tables.shape[1],
            num_heads=query_THD.shape[1],
            kv_heads=keys_NSKD.shape[2],
            key_dim=keys_NSKD.shape[3],
            value_dim=values_NSKD.shape[3],
            block_size=keys_NSKD.shape[1],
            query_row_stride=query_THD.stride(0),
            query_head_stride=query_THD.stride(1),
            key_block_stride=keys_NSKD.stride(0),
            key_token_stride=keys_NSKD.stride(1),
            value_block_stride=values_NSKD.stride(0),
            value_token_stride=values_NSKD.stride(1),
            window=options.window or 0,
            scaling=options.scaling,
            softcap=options.softcap or 0.0,
        )
        is_bfloat16 = query_THD.dtype is torch.bfloat16
        self._attend(ctypes.byref(task), self.level, is_bfloat16, torch.get_num_threads())


def load_native_attention() -> NativeAttention | None:
    """None where it cannot be used here."""
    try:
        return NativeAttention()
    except KernelUnavailableError:
        return None
