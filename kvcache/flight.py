"""A unit of weights on its way into the ring."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from kvcache.arena import ALIGNMENT
from kvcache.unit_layout import UnitLayout


class FlightState(enum.Enum):
    """Of a flight's read, and its copy where it makes one."""

    LOADING = enum.auto()
    READY = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True, eq=False)
class Flight:
    """One unit on its way into the ring, or in it. ``staging`` is where its read lands, if not
    there. ``missing`` are the experts that do not come with it."""

    layout: UnitLayout
    start: int
    buffer: torch.Tensor
    views: dict[str, torch.Tensor]
    staging: torch.Tensor | None = None
    staging_start: int = 0
    state: FlightState = FlightState.LOADING
    holders: int = 0
    attempts: int = 0
    begun_s: float = 0.0
    dropped: bool = False
    missing: set[int] = field(default_factory=set)
    error: BaseException | None = None

    @property
    def num_bytes(self) -> int:
        """Of what comes before anyone asks for experts, in whole pages."""
        if not self.missing:
            return self.layout.num_bytes
        return -(-self.layout.dense_bytes // ALIGNMENT) * ALIGNMENT
