"""FLOP/s of matrix products as shards run them, by rows: resident weights and streamed ones."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from giantserve.models.linear import can_pack, pack, product
from giantserve.probes.timing import seconds_of
from kvcache.arena import Arena
from kvcache.tier import Tier
from partition.bandwidths import GemmRate

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
WIDTH_IN, WIDTH_OUT = 2048, 8192
NUM_WEIGHTS = 4
"""Used in turn, so that none stays in the caches."""


def probe_gemm(device: str, dtype: str) -> tuple[tuple[GemmRate, ...], tuple[GemmRate, ...]]:
    """The rates of resident weights, and of streamed ones where these are computed differently.

    Takes about 2 s for each.
    """
    plain = [_linear(device, dtype) for _ in range(NUM_WEIGHTS)]
    streamed = _rates(plain)
    if not can_pack(plain[0], plain[0].weight):
        return streamed, ()
    arena = Arena(Tier.DEVICE, sum(_num_bytes(linear) for linear in plain), torch.device(device))
    for linear in plain:
        held = arena.allocate(_num_bytes(linear)).view(linear.weight.dtype)
        weight = held.view_as(linear.weight).copy_(linear.weight)
        pack(linear, weight, arena)
    return _rates(plain), streamed


def _linear(device: str, dtype: str) -> nn.Linear:
    linear = nn.Linear(
        WIDTH_IN, WIDTH_OUT, bias=False, dtype=getattr(torch, dtype), device=torch.device(device)
    )
    linear.requires_grad_(False).weight.fill_(0.01)
    return linear


def _num_bytes(linear: nn.Linear) -> int:
    return linear.weight.numel() * linear.weight.element_size()


def _rates(linears: list[nn.Linear]) -> tuple[GemmRate, ...]:
    return tuple(
        GemmRate(rows=rows, flops_per_s=2 * rows * WIDTH_IN * WIDTH_OUT / _seconds(linears, rows))
        for rows in ROWS
    )


def _seconds(linears: list[nn.Linear], rows: int) -> float:
    weight = linears[0].weight
    hidden = torch.full((rows, WIDTH_IN), 0.01, dtype=weight.dtype, device=weight.device)
    turns = itertools.cycle(linears)
    return seconds_of(lambda: product(next(turns), hidden), str(weight.device))
