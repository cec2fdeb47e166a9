"""How long a pass takes on a stage: the largest of its overlapping terms, plus what does not
overlap.

Loads and times are float64 arrays: 0-d for one stage, [layers + 1, layers + 1] for all stages at
once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from partition.bandwidths import Bandwidths
from partition.links import Link
from partition.profile import ModelProfile, Unit, UnitKind

Array = NDArray[np.float64]
PAGE_BYTES = 4096
TERMS = ("device memory", "host link", "disk", "compute", "collectives", "unit latency")


def page_rounded(num_bytes: int) -> int:
    """The whole pages that ``num_bytes`` take on any tier: O_DIRECT reads by page."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def distinct_experts(num_experts: int, per_token: int, num_tokens: int) -> float:
    """Expected number of distinct experts that a pass routes to: E (1 - (1 - k/E)^n).

    Each token takes k of E experts; with independent uniform routing an expert is missed by one
    token with probability 1 - k/E (the occupancy bound used by MoE-Lightning and MoE-Lens).
    """
    return float(num_experts * (1 - (1 - per_token / num_experts) ** num_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one rank of a stage holds and does.

    ``dense_bytes`` and ``expert_bytes`` are weights read by compute; ``flops_per_token`` those of
    the matrix products, ``attention_flops`` those of attention per token and position of its
    context; ``kv_bytes_per_token`` the cache. ``stream_bytes`` (page-rounded) may live on any tier.
    """

    dense_bytes: Array
    expert_bytes: Array
    flops_per_token: Array
    attention_flops: Array
    kv_bytes_per_token: Array
    num_units: Array
    num_layers: Array
    stream_bytes: Array
    small_bytes: Array
    embedding_bytes: Array

    @classmethod
    def stack(cls, rows: list[dict[str, float]]) -> Load:
        """One Load whose arrays have an entry per row; names a row lacks are 0."""
        return cls(
            **{f.name: np.array([row.get(f.name, 0.0) for row in rows]) for f in fields(cls)}
        )

    def at(self, first: int, end: int) -> Load:
        """The 0-d load of the stage [first, end) of a [layers + 1, layers + 1] table."""
        return Load(**{f.name: getattr(self, f.name)[first, end] for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """The tokens of a pass and the cache they read: ``num_sequences`` times ``context``
    positions."""

    num_tokens: int
    num_sequences: int
    context: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Prices a pass on a device for one way of splitting a model. Pure."""

    profile: ModelProfile
    tensor_parallel: int
    activation_bytes: int

    def terms(
        self,
        load: Load,
        shape: PassShape,
        rates: Bandwidths,
        streamed_bytes: Array | float = 0.0,
        disk_bytes: Array | float = 0.0,
        *,
        group_link: Link,
        next_link: Link | None,
    ) -> dict[str, Array]:
        """Seconds by term. ``streamed_bytes`` are all that is not resident, ``disk_bytes`` its part
        on NVMe. ``group_link`` joins the ranks of the stage, ``next_link`` leads to the next stage
        (None: this is the last).

        The roofline (Williams et al., 2009) extended to tiers as in FlexGen (Sheng et al., 2023):
        weights and KV over device memory, streamed weights over the host link, disk bytes over the
        disk, and 2 FLOP per parameter and token plus 4 per head element and position for attention.
        """
        touched = load.dense_bytes + load.expert_bytes * self._expert_share(shape.num_tokens)
        kv = load.kv_bytes_per_token * (shape.num_sequences * shape.context)
        flops = shape.num_tokens * (load.flops_per_token + load.attention_flops * shape.context)
        hidden_bytes = shape.num_tokens * self.profile.hidden_size * self.activation_bytes
        # row-parallel products end each layer's attention and MLP with an all-reduce (Megatron-LM)
        collectives = (
            2 * load.num_layers * group_link.all_reduce_s(hidden_bytes, self.tensor_parallel)
        )
        if next_link is not None:
            collectives = collectives + next_link.send_s(hidden_bytes)
        return {
            "device memory": (touched + kv) / rates.device_memory,
            "host link": np.asarray(streamed_bytes / rates.host_to_device),
            "disk": np.asarray(disk_bytes / rates.disk_read),
            "compute": flops / rates.flops_per_s(shape.num_tokens),
            "collectives": np.asarray(collectives),
            "unit latency": load.num_units * rates.unit_latency_s,
        }

    def _expert_share(self, num_tokens: int) -> float:
        experts, per_token = self.profile.num_experts, self.profile.num_experts_per_token
        if experts < 2:
            return 1.0
        return distinct_experts(experts, per_token, num_tokens) / experts


def pass_time(terms: dict[str, Array]) -> Array:
    """Seconds of a pass: streams and compute overlap, collectives and unit latency do not."""
    overlapped = np.maximum(
        np.maximum(terms["device memory"], terms["host link"]),
        np.maximum(terms["disk"], terms["compute"]),
    )
    return np.asarray(overlapped + terms["collectives"] + terms["unit latency"])


def pipeline_cycle_s(stage_times: list[float], passes: int) -> float:
    """Seconds between two tokens of a sequence with ``passes`` in flight (GPipe, Huang et al.,
    2019).

    A pass returns after all stages, but not before the slowest stage has served every pass in
    flight.
    """
    return max(sum(stage_times), passes * max(stage_times))


def unit_row(
    unit: Unit, profile: ModelProfile, rank: int, world: int, num_bytes: int, footprint: int
) -> dict[str, float]:
    """One unit's contribution to a Load; its slice has ``num_bytes`` and takes ``footprint``."""
    if unit.kind is UnitKind.EMBEDDING:  # a pass gathers its tokens' rows: kilobytes
        return {"embedding_bytes": footprint, "num_units": 1}
    if unit.kind is UnitKind.SMALL:
        return {"dense_bytes": num_bytes, "small_bytes": footprint, "num_units": 1}
    expert_bytes = 0
    flops = 0.0
    for spec in unit.parameters:
        elements = spec.local_bytes(profile.heads, rank, world) / spec.dtype_bytes
        if spec.num_experts > 1:
            expert_bytes += spec.local_bytes(profile.heads, rank, world)
            elements *= profile.num_experts_per_token / spec.num_experts
        if len(spec.shape) > 1:
            flops += 2 * elements
    return {
        "dense_bytes": num_bytes - expert_bytes,
        "expert_bytes": expert_bytes,
        "flops_per_token": flops,
        "num_units": 1,
        "stream_bytes": footprint,
    }
