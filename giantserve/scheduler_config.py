"""The limits within which the scheduler plans passes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from giantserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """``max_num_seqs`` sequences run at a time, ``max_num_batched_tokens`` tokens go through one
    pass, in chunks of ``max_slice_tokens`` at most, up to ``max_passes_in_flight`` passes are under
    way (the pipeline's stages), ``max_queued_requests`` sequences wait. ``max_model_len`` counts
    prompt and output. Raises ConfigError below 1.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_slice_tokens: int
    max_model_len: int
    max_passes_in_flight: int
    block_size: int
    max_queued_requests: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ConfigError(f"{field.name} is {value}; it must be at least 1")
