"""What can go wrong when bytes are kept or moved. All survive pickling; each names the mend."""

from __future__ import annotations

from kvcache.tier import Tier


class TierError(Exception):
    """Base of the memory manager's errors. ``status_code`` is the HTTP status it maps to."""

    status_code = 500


class TierFullError(TierError):
    """An allocation would pass a tier's capacity. All figures are bytes."""

    status_code = 507

    def __init__(self, tier: Tier, asked: int, free: int, capacity: int) -> None:
        super().__init__(tier, asked, free, capacity)
        self.tier = tier
        self.asked = asked
        self.free = free
        self.capacity = capacity

    def __str__(self) -> str:
        return (
            f"the {self.tier.value} tier cannot hold {self.asked} more bytes: {self.free} of its "
            f"{self.capacity} are free; raise its budget or place less on it"
        )


class StorageError(TierError):
    """A file could not be read or written. ``offset`` is the byte in the file where it failed."""

    def __init__(self, path: str, offset: int, reason: str) -> None:
        super().__init__(path, offset, reason)
        self.path = path
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}: {self.reason}"


class StoreError(TierError):
    """A folder or file of weights, KV or activations cannot be used as it is; the message names the
    mend."""


class CorruptUnitError(StoreError):
    """A unit's bytes in the store are not the bytes that were written."""

    def __init__(self, unit: str, path: str) -> None:
        super().__init__(unit, path)
        self.unit = unit
        self.path = path

    def __str__(self) -> str:
        return (
            f"unit {self.unit} in {self.path} fails its checksum: the disk or another process "
            f"changed it; delete {self.path} and start again to rebuild it from the checkpoint"
        )


class BackendUnavailableError(TierError):
    """A storage backend was asked for that this machine cannot run; the message says what to
    install."""

    status_code = 400
