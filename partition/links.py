"""The connections between devices, and what messages and collectives over them take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from partition.errors import FieldError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What devices of one node, or of two, send each other over: one direction, in bytes/s.

    ``all_reduce_bandwidth`` is the rate of one rank's link in a ring and ``all_reduce_latency_s``
    what a collective costs at any size; None: those of a message.
    """

    bandwidth: float
    latency_s: float
    all_reduce_bandwidth: float | None = None
    all_reduce_latency_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth", "all_reduce_bandwidth", "latency_s", "all_reduce_latency_s"):
            value = getattr(self, name)
            if value is None:
                continue
            is_latency = name.endswith("_s")
            if not (value >= 0 if is_latency else value > 0) or not math.isfinite(value):
                raise FieldError(name, f"{value} cannot be; it must be a positive, finite number")

    def between_nodes(self, devices_per_node: int) -> Link:
        """This link for a collective to which every node brings so many devices: each brings its
        own rail, until what the nodes reach together binds."""
        rails = devices_per_node * self.bandwidth
        return replace(self, all_reduce_bandwidth=min(self.all_reduce_bandwidth or math.inf, rails))

    def send_s(self, num_bytes: float) -> float:
        """A point-to-point message between stages: latency plus bytes over the link (Hockney,
        1994)."""
        return self.latency_s + num_bytes / self.bandwidth

    def all_reduce_s(self, num_bytes: float, world: int) -> float:
        """A ring all-reduce moves 2 (w-1)/w of the message in 2 (w-1) hops (Thakur et al.,
        2005)."""
        if world == 1:
            return 0.0
        share = 2 * (world - 1) / world
        latency = self.latency_s if self.all_reduce_latency_s is None else self.all_reduce_latency_s
        return latency + share * num_bytes / (self.all_reduce_bandwidth or self.bandwidth)
