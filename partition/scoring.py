"""Which of two plans is better under an objective, and which keep the workload's limits."""

from __future__ import annotations

from dataclasses import dataclass

from partition.cost import PassShape
from partition.layout_search import Layout
from partition.plan import Forecast
from partition.sizing import (
    Sizing,
    batch_size,
    decode_shape,
    num_prefill_passes,
    prefill_shape,
)
from partition.workload import Objective, Workload

Score = tuple[float, ...]
"""Larger is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The order of plans for one objective and workload."""

    objective: Objective
    workload: Workload

    def shape(self, layout: Layout, sizing: Sizing) -> PassShape:
        """The pass whose cycle is scored."""
        if self.objective is Objective.MIN_TTFT:
            return prefill_shape(sizing, self.workload)
        return decode_shape(sizing, self.workload, layout.passes_in_flight)

    def score(self, layout: Layout, sizing: Sizing, cycle_s: float) -> Score | None:
        """The better, the shorter the cycle; ties go to more KV, then to fewer devices. None: such
        a cycle is above the limit of the time per output token, or nothing fits at all."""
        if cycle_s == float("inf"):
            return None
        batch = batch_size(sizing, self.workload)
        devices = float(layout.num_devices)
        if self.objective is Objective.MIN_TTFT:  # the pipeline fills, then each pass follows
            rest = num_prefill_passes(sizing, self.workload) - 1
            return -cycle_s * (1 + rest / layout.passes_in_flight), float(batch), -devices
        limit = self.workload.tpot_limit_s
        if limit is not None and cycle_s > limit:
            return None
        rate, blocks = batch / max(cycle_s, 1e-12), float(sizing.num_device_blocks)
        if self.objective is Objective.MIN_TPOT:
            return float(batch), -cycle_s, blocks, -devices
        if self.objective is Objective.LEAST_DEVICES:
            return -devices, rate, blocks
        return rate, blocks, -devices

    def keeps_limits(self, forecast: Forecast) -> bool:
        """Whether the plan of this forecast keeps the workload's limits."""
        limits = (
            (self.workload.ttft_limit_s, forecast.time_to_first_token_s),
            (self.workload.tpot_limit_s, forecast.time_per_output_token_s),
        )
        return all(limit is None or value <= limit for limit, value in limits)
