"""The memory tiers and the byte budgets a shard may use on each."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Tier(enum.Enum):
    """Where bytes lie. DEVICE is a byte-capped arena: CUDA memory, or plain memory without a
    GPU."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierBudget:
    """Bytes one shard may hold on each tier. Hard limits: an arena refuses to go past them."""

    device_bytes: int
    host_bytes: int
    nvme_bytes: int

    def of(self, tier: Tier) -> int:
        """The budget of one tier, in bytes."""
        return {
            Tier.DEVICE: self.device_bytes,
            Tier.HOST: self.host_bytes,
            Tier.NVME: self.nvme_bytes,
        }[tier]
