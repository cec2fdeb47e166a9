"""How many tokens a pass carries where its hidden states need not all fit the device.

A pass that streams its weights takes as long for one slice of tokens as for as many as compute in
that time, so these are free: their states wait on the host, and beyond that on NVMe, between the
layers (`kvcache.activations`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcache.layout import DTYPE_BYTES
from kvcache.micro_batch import ACTIVATION_BUFFERS
from kvcache.tier import TierBudget
from partition.bandwidths import Bandwidths
from partition.cost import PAGE_BYTES, Array, page_rounded
from partition.profile import ModelProfile

ACTIVATION_SHARE = 16
"""The part of the host's and of NVMe's budget that states may take: one of so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRoom:
    """What a shard keeps for states: ``host_bytes``, of which ``buffer_bytes`` are what those on
    NVMe pass through, and ``nvme_bytes``; enough for passes of ``max_tokens`` (0: for none)."""

    host_bytes: int = 0
    buffer_bytes: int = 0
    nvme_bytes: int = 0
    max_tokens: int = 0
    row_bytes: int = 0
    slice_tokens: int = 0

    def for_tokens(self, num_tokens: int) -> ActivationRoom:
        """What smaller passes need of it."""
        return _room(
            self.row_bytes, self.slice_tokens, num_tokens, self.host_bytes, self.nvme_bytes
        )


NO_ROOM = ActivationRoom()


def activation_room(
    profile: ModelProfile, budget: TierBudget, slice_tokens: int, wanted_tokens: int
) -> ActivationRoom:
    """Room for passes of up to ``wanted_tokens`` in slices of ``slice_tokens``, on the host as far
    as its share allows, then on NVMe; none where it is not worth it."""
    row_bytes = profile.hidden_size * DTYPE_BYTES[profile.dtype]
    host_share = budget.host_bytes // ACTIVATION_SHARE // PAGE_BYTES * PAGE_BYTES
    nvme_share = budget.nvme_bytes // ACTIVATION_SHARE // PAGE_BYTES * PAGE_BYTES
    room = _room(row_bytes, slice_tokens, wanted_tokens, host_share, nvme_share)
    if wanted_tokens <= slice_tokens or room.max_tokens < 2 * slice_tokens:
        return NO_ROOM
    return room


def _room(
    row_bytes: int, slice_tokens: int, wanted_tokens: int, host_bytes: int, nvme_bytes: int
) -> ActivationRoom:
    """Of at most so many bytes of either tier."""
    # neighbouring slices have more tokens than one slice has room for; each ends on a page
    pages = (2 * math.ceil(wanted_tokens / slice_tokens) + 1) * PAGE_BYTES
    wanted = page_rounded(wanted_tokens * row_bytes) + pages
    slice_bytes = page_rounded(slice_tokens * row_bytes)
    buffers = ACTIVATION_BUFFERS * slice_bytes
    host, nvme = min(wanted, host_bytes), 0
    if host < wanted and nvme_bytes and host >= buffers:
        # what is left of the host's part beside its last slice holds none
        nvme = min(nvme_bytes, wanted - (host - buffers) + slice_bytes)
    held = host - pages
    if nvme:
        held += nvme - buffers - slice_bytes
    return ActivationRoom(
        host_bytes=host,
        buffer_bytes=buffers if nvme else 0,
        nvme_bytes=nvme,
        max_tokens=max(0, min(wanted_tokens, held // row_bytes)),
        row_bytes=row_bytes,
        slice_tokens=slice_tokens,
    )


def balanced_slices(
    terms: dict[str, Array],
    rates: Bandwidths,
    room: ActivationRoom,
    num_layers: int,
) -> float:
    """How many slices a pass carries until computing them takes as long as bringing its weights.

    ``terms`` are those of a pass with one slice. States on NVMe are read and written once a layer,
    beside the weights; where that takes half of what computing them does, they stay off it.
    """
    once = float(terms["copies"] + terms["routed experts"])
    once += float(max(terms["host link"], terms["disk"]))
    again = sum(float(terms[name]) for name in ("attention", "elementwise", "collectives"))
    again += float(max(terms["device memory"], terms["compute"]))
    slices, slice_bytes = once / again, room.slice_tokens * room.row_bytes
    on_host = (room.host_bytes - room.buffer_bytes) // slice_bytes
    if slices <= on_host:
        return slices
    moved_s = slice_bytes * num_layers * (1 / rates.disk_read + 1 / rates.disk_write)
    if not room.nvme_bytes or 2 * moved_s > again:
        return float(on_host)
    return (once - on_host * moved_s) / (again - moved_s)
