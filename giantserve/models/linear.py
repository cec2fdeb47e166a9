"""Matrix products of resident weights on the CPU, in the layout that oneDNN wants.

oneDNN reorders a plain weight at every call. A weight that stays on the device is reordered once;
the product has the same bits. Measured on a CPU with AVX512-BF16 (5632 x 2048, bf16): 1.7x at 1
row, 1.35x at 32 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from giantserve.models.patching import replace_forward
from kvcache.arena import Arena

EXPECTED_ROWS = 32
"""The row count the layout is chosen for; on the CPUs tried, it made no difference to other
counts."""


def product(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """``hidden`` times the module's weight, without its bias."""
    packed = getattr(linear, "packed_weight", None)
    if packed is None:
        return F.linear(hidden, linear.weight)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")
    return out


def can_pack(linear: nn.Module, weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout of its own for this weight."""
    return (
        type(linear) is nn.Linear
        and weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and torch._C._has_mkldnn
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(linear: nn.Linear, weight: torch.Tensor, arena: Arena) -> None:
    """Reorder ``weight``, which lies in ``arena``, and give its pages back; the packed copy takes
    their place in the arena's count. Whoever reads the module's plain weight from now on gets an
    error; of calls that began before, see `pack_later`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_ROWS)
    linear.packed_weight = packed
    pack_later(linear)
    linear.weight = nn.Parameter(weight.new_empty(0, 0), requires_grad=False)
    arena.discard(weight)


def pack_later(linear: nn.Linear) -> None:
    """Let each call find out whether the weight is packed after the module's hooks have run, which
    may wait for it: torch picks the forward before."""
    if "forward" not in vars(linear):
        replace_forward(linear, lambda hidden: _affine(linear, hidden))


def _affine(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    packed = getattr(linear, "packed_weight", None)
    if packed is None:
        return F.linear(hidden, linear.weight, linear.bias)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        hidden, packed, linear.bias, "none", [], ""
    )
    return out
