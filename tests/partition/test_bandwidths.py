"""Rates by rows, and what a tile leaves unused."""

from __future__ import annotations

from dataclasses import replace

from planner_models import RATES


def test_a_tile_that_is_not_full_takes_as_long_as_a_full_one() -> None:
    tiled = replace(RATES, row_tile=64)
    assert tiled.flops_per_s(64) == RATES.flops_per_s(64)
    assert tiled.flops_per_s(128) == RATES.flops_per_s(128)
    assert tiled.flops_per_s(96) == 0.75 * RATES.flops_per_s(96)
    assert tiled.flops_per_s(1) == RATES.flops_per_s(1) / 64
