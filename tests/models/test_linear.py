"""A weight that is packed for oneDNN, and those who would read it as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from giantserve.models.linear import can_pack, pack, pack_later
from kvcache.arena import Arena
from kvcache.tier import Tier

ROWS, COLUMNS = 96, 64


def test_nobody_reads_the_plain_weight_of_a_packed_one() -> None:
    arena = Arena(Tier.DEVICE, 1 << 20)
    linear = nn.Linear(COLUMNS, ROWS)
    stored = arena.allocate(ROWS * COLUMNS * 2).view(torch.bfloat16).view(ROWS, COLUMNS)
    stored.copy_(torch.randn(ROWS, COLUMNS))
    linear.weight = nn.Parameter(stored, requires_grad=False)
    linear.bias = nn.Parameter(torch.randn(ROWS).bfloat16(), requires_grad=False)
    hidden = torch.randn(3, COLUMNS).bfloat16()
    expected = F.linear(hidden, linear.weight, linear.bias)
    if not can_pack(linear, linear.weight):
        pytest.skip("oneDNN has no bf16 products on this CPU")
    pack_later(linear)
    begun = linear.forward
    assert torch.equal(begun(hidden), expected)
    pack(linear, stored, arena)
    assert torch.equal(begun(hidden), expected)
    assert torch.equal(linear(hidden), expected)
    with pytest.raises(RuntimeError):
        F.linear(hidden, linear.weight)
    arena.close()
