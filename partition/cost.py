"""How long a pass takes on a stage: the slowest of what works at the same time.

Loads and times are float64 arrays: 0-d for one stage, [layers + 1, layers + 1] for all stages at
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from partition.bandwidths import Bandwidths
from partition.links import Link
from partition.profile import ModelProfile, Unit, UnitKind

Array = NDArray[np.float64]
PAGE_BYTES = 4096
TINY_RATE = 1e-3
"""Bytes/s of what cannot be done: a time that loses to every other, and still adds up."""

LOGIT_BYTES = 16
"""Memory traffic of a sampled logit: written, widened to fp32, reduced."""

NORM_TRAFFIC = 6
"""How often a normalised row passes through memory: 3 for the residual sum, 3 for the norm (read
for the statistics and for the scaling, written)."""


def page_rounded(num_bytes: int) -> int:
    """The whole pages that ``num_bytes`` take on any tier: O_DIRECT reads by page."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one rank of a stage holds and does.

    ``dense_bytes`` and ``expert_bytes`` are weights read by compute; ``flops_per_token`` those of
    the layers' matrix products, ``head_flops`` those of the head per sampled row, ``vocab`` the
    logits of such a row, ``attention_flops`` those of attention per token and position of its
    context; ``num_experts`` are all that its layers have, ``routed_bytes`` the part of the experts'
    of which only those are read that a pass routes to; ``activation_bytes`` what goes in and out of
    products and norms per token, ``kv_bytes_per_token`` the cache. ``stream_bytes`` (page-rounded)
    may live on any tier.
    """

    dense_bytes: Array
    expert_bytes: Array
    routed_bytes: Array
    flops_per_token: Array
    head_flops: Array
    vocab: Array
    attention_flops: Array
    activation_bytes: Array
    kv_bytes_per_token: Array
    num_layers: Array
    num_experts: Array
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
    """The tokens of a pass and the cache they read: ``num_sequences`` times ``context`` positions,
    of which the share ``host_kv`` lies on the host and ``nvme_kv`` on NVMe, and comes in
    ``micro_batches``, while ``attended_kv`` stays on the host and is attended to there. Of a
    sequence on NVMe so many tokens are ``written`` back, of one on the host ``rewritten`` where
    they change their dtype. On the host a byte becomes ``host_share``, on NVMe ``nvme_share``, both
    in ``storage_dtype``; NVMe is read by ``kv_read_bytes`` and written by ``kv_write_bytes``."""

    num_tokens: int
    num_sequences: int
    context: float
    host_kv: float = 0.0
    nvme_kv: float = 0.0
    attended_kv: float = 0.0
    written: float = 0.0
    rewritten: float = 0.0
    host_share: float = 1.0
    nvme_share: float = 1.0
    storage_dtype: str = "auto"
    kv_read_bytes: float = math.inf
    kv_write_bytes: float = math.inf
    micro_batches: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Prices a pass on a device for one way of splitting a model, of whose routed experts a tensor
    is ``expert_bytes`` long. Pure."""

    profile: ModelProfile
    tensor_parallel: int
    activation_bytes: int
    expert_bytes: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_bytes", self._expert_bytes())

    def _expert_bytes(self) -> float:
        """The mean over the expert tensors, which are read one by one."""
        heads, world = self.profile.heads, self.tensor_parallel
        routed = {
            (spec.shape, spec.rule): spec
            for unit in self.profile.units
            for spec in unit.parameters
            if self.profile.is_routed(spec)
        }
        sizes = [
            spec.local_bytes(heads, 0, world) / spec.local_shape(heads, 0, world)[0]
            for spec in routed.values()
        ]
        return sum(sizes) / len(sizes) if sizes else math.inf

    def terms(
        self,
        load: Load,
        shape: PassShape,
        rates: Bandwidths,
        streamed_bytes: Array | float = 0.0,
        disk_bytes: Array | float = 0.0,
        streamed_experts: Array | float = 0.0,
        disk_experts: Array | float = 0.0,
        *,
        group_link: Link,
        next_link: Link | None,
    ) -> dict[str, Array]:
        """Seconds by term. ``streamed_bytes`` are all that is not resident, ``disk_bytes`` its part
        on NVMe; ``streamed_experts`` and ``disk_experts`` are the routed experts' part of either.
        ``group_link`` joins the ranks of the stage, ``next_link`` leads to the next stage
        (None: this is the last).

        The roofline (Williams et al., 2009) extended to tiers as in FlexGen (Sheng et al., 2023):
        weights over device memory, streamed weights over the host link, disk bytes over the disk,
        and 2 FLOP per parameter and token. Attention reads its KV at a rate of its own, or does 4
        FLOP per head element and position where these take longer. KV that rotates moves as weights
        do that stream; new tokens on NVMe are written back. Routed experts that stream are read
        once the router has spoken, and nothing else is computed meanwhile; where nearly all are
        needed they are read ahead like everything else. Small requests have the disk's rate for
        their size. KV of another storage dtype is converted by the device. Each micro-batch, and KV
        on a host that is not the device itself, is one more part of every layer's attention.
        """
        runtime, tokens, sampled = rates.runtime, shape.num_tokens, shape.num_sequences
        touched = load.dense_bytes + load.expert_bytes * self.profile.expert_share(tokens)
        products = tokens * load.flops_per_token + sampled * load.head_flops
        held = np.maximum(load.dense_bytes + load.expert_bytes, 1.0)
        share = np.minimum(1.0, streamed_bytes / held)
        read = self.profile.streamed_expert_share(tokens)
        routed_s = read * disk_experts / rates.disk_read_of(self.expert_bytes)
        if rates.copies_overlap:
            routed_s = routed_s + read * (streamed_experts - disk_experts) / rates.host_to_device
        fast, slow = rates.flops_per_s(tokens), rates.flops_per_s(tokens, streamed=True)
        kv_bytes = load.kv_bytes_per_token * (sampled * shape.context)
        kv_s = kv_bytes * ((1 - shape.attended_kv) / rates.attention)
        if shape.attended_kv:
            kv_s = kv_s + kv_bytes * (shape.attended_kv / (rates.attention_on_host or TINY_RATE))
        scores_s = tokens * load.attention_flops * shape.context / rates.gemm[-1].flops_per_s
        elementwise_s = tokens * load.activation_bytes
        elementwise_s = elementwise_s / (runtime.elementwise or rates.device_memory)
        logits_s = sampled * load.vocab / (runtime.sampling or rates.device_memory / LOGIT_BYTES)
        hidden_bytes = tokens * self.profile.hidden_size * self.activation_bytes
        # row-parallel products end each layer's attention and MLP with an all-reduce (Megatron-LM)
        reduce_s = group_link.all_reduce_s(hidden_bytes, self.tensor_parallel)
        send_s = 0.0 if next_link is None else next_link.send_s(hidden_bytes)
        copies_s, link_s, disk_s = self.transfers(
            load, shape, rates, streamed_bytes, disk_bytes, streamed_experts, disk_experts
        )
        if shape.storage_dtype != "auto":
            copies_s = copies_s + self._conversion_s(load, shape, rates)
        parts = 1 + shape.micro_batches + (shape.attended_kv > 0 and rates.copies_overlap)
        latency_s = load.num_layers * (parts * runtime.layer_latency_s)
        if runtime.expert_latency_s:
            computed = self.profile.expert_share(tokens)
            latency_s = latency_s + load.num_experts * (computed * runtime.expert_latency_s)
        return {
            "device memory": touched / rates.device_memory,
            "compute": products * ((1 - share) / fast + share / slow),
            "attention": np.maximum(kv_s, scores_s),
            "elementwise": elementwise_s + logits_s,
            "collectives": 2 * load.num_layers * reduce_s + send_s,
            "latency": latency_s + runtime.pass_latency_s,
            "routed experts": np.asarray(routed_s if read < 1 else 0.0),
            "copies": copies_s,
            "host link": link_s,
            "disk": disk_s,
        }

    def transfers(
        self,
        load: Load,
        shape: PassShape,
        rates: Bandwidths,
        streamed_bytes: Array | float,
        disk_bytes: Array | float,
        streamed_experts: Array | float,
        disk_experts: Array | float,
    ) -> tuple[Array, Array, Array]:
        """The terms "copies", "host link" and "disk" of `terms`."""
        left_out = 1 - self.profile.streamed_expert_share(shape.num_tokens)
        if left_out:
            streamed_bytes = streamed_bytes - left_out * streamed_experts
            disk_bytes = disk_bytes - left_out * disk_experts
        from_host = streamed_bytes - disk_bytes
        disk_s = disk_bytes / rates.disk_read
        per_token = load.kv_bytes_per_token * shape.num_sequences
        if shape.host_kv:
            from_host = from_host + per_token * (shape.context * shape.host_kv * shape.host_share)
        nvme_kv: Array | float = 0.0
        if shape.nvme_kv:
            on_nvme = per_token * (shape.nvme_kv * shape.nvme_share)
            nvme_kv = on_nvme * shape.context
            disk_s = disk_s + nvme_kv / rates.disk_read_of(shape.kv_read_bytes)
            disk_s = disk_s + on_nvme * (shape.written / rates.disk_write_of(shape.kv_write_bytes))
        nothing = np.asarray(0.0)
        if rates.copies_overlap:
            link_s = (from_host + disk_bytes + nvme_kv) / rates.host_to_device
            return nothing, np.asarray(link_s), np.asarray(disk_s)
        # there is no link: NVMe is read into place
        return np.asarray(from_host / rates.host_to_device), nothing, np.asarray(disk_s)

    @staticmethod
    def _conversion_s(load: Load, shape: PassShape, rates: Bandwidths) -> Array:
        """Seconds in which KV changes between its dtypes."""
        codec = rates.kv_codec(shape.storage_dtype)
        decoded = (shape.host_kv + shape.nvme_kv) * shape.context
        encoded = shape.host_kv * shape.rewritten + shape.nvme_kv * shape.written
        per_token = load.kv_bytes_per_token * shape.num_sequences
        return np.asarray(per_token * (decoded / codec.decode + encoded / codec.encode))


def compute_time(terms: dict[str, Array]) -> Array:
    """Seconds in which the device itself is busy: its products read weights while they compute,
    all else comes one after the other."""
    products = np.maximum(terms["device memory"], terms["compute"])
    rest = ("attention", "elementwise", "collectives", "latency", "routed experts", "copies")
    return np.asarray(products + sum(terms[name] for name in rest))


def pass_time(terms: dict[str, Array]) -> Array:
    """Seconds of a pass: the device, the host link and the disk work at the same time, so the
    slowest decides."""
    return np.maximum(compute_time(terms), np.maximum(terms["host link"], terms["disk"]))


def unit_row(
    unit: Unit, profile: ModelProfile, rank: int, world: int, num_bytes: int, footprint: int
) -> dict[str, float]:
    """One unit's contribution to a Load; its slice has ``num_bytes`` and takes ``footprint``."""
    if unit.kind is UnitKind.EMBEDDING:  # a pass gathers its tokens' rows: kilobytes
        return {"embedding_bytes": footprint}
    expert_bytes = routed_bytes = num_experts = 0
    flops = 0.0
    activations = 0.0
    for spec in unit.parameters:
        used = 1.0
        if spec.num_experts > 1:
            held = spec.local_bytes(profile.heads, rank, world)
            expert_bytes += held
            routed_bytes += held if profile.is_routed(spec) else 0
            num_experts = spec.local_shape(profile.heads, rank, world)[0]
            used = profile.num_experts_per_token / spec.num_experts
        shape = spec.local_shape(profile.heads, rank, world)
        elements = math.prod(shape)
        if len(shape) > 1:
            flops += 2 * elements * used
            matrices = elements / (shape[-2] * shape[-1]) * used
            activations += (shape[-2] + shape[-1]) * matrices * spec.dtype_bytes
        else:
            activations += NORM_TRAFFIC * elements * spec.dtype_bytes
    if unit.kind is UnitKind.SMALL:
        return {
            "dense_bytes": num_bytes,
            "small_bytes": footprint,
            "activation_bytes": activations,
        }
    work = {"flops_per_token": flops, "activation_bytes": activations}
    if unit.kind is UnitKind.HEAD:
        work = {"head_flops": flops, "vocab": profile.vocab_size}
    return {
        "dense_bytes": num_bytes - expert_bytes,
        "expert_bytes": expert_bytes,
        "routed_bytes": routed_bytes,
        "num_experts": num_experts,
        "stream_bytes": footprint,
        **work,
    }
