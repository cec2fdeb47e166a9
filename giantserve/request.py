"""One sequence as the scheduler tracks it, from admission to its end."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from giantserve.sampling_params import SamplingParams
from kvcache.block_hash import hash_block, tenant_root


class RequestStatus(enum.Enum):
    """Where a request stands. Only RUNNING ones hold device or rotating blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED_ON_HOST = "preempted_on_host"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A sequence to generate. The first block of fields is the caller's; the rest is the
    scheduler's.

    ``seq_id`` is never reused. Higher ``priority`` goes first, then earlier ``arrival_s``.
    ``deadline`` is in seconds of the scheduler's clock. ``end_token_ids`` are barred until
    ``sampling.min_tokens``. ``num_computed_tokens`` counts tokens whose KV is computed by passes
    planned so far; ``num_cached_tokens`` those of the prompt whose KV was reused at the first
    admission. ``block_ids`` cover all known tokens while RUNNING, ``host_block_ids`` the computed
    ones while PREEMPTED_ON_HOST. ``on_shards``: the shards keep state under ``seq_id``.
    ``is_lost``: some of its KV is, so what its passes in flight bring is worthless; ``num_losses``
    counts how often that happened.
    """

    seq_id: int
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    tenant: str = ""
    priority: int = 0
    arrival_s: float = 0.0
    deadline: float | None = None
    end_token_ids: tuple[int, ...] = ()

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    host_block_ids: list[int] = field(default_factory=list)
    num_passes_in_flight: int = 0
    last_step_id: int = -1
    on_shards: bool = False
    is_lost: bool = False
    num_losses: int = 0
    _block_hashes: list[bytes] = field(default_factory=list, repr=False)

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sorts requests by who is served first."""
        return (-self.priority, self.arrival_s, self.seq_id)

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens_to_compute(self) -> int:
        """Known tokens whose KV is not planned yet; 0 while the next token is being sampled."""
        return self.num_tokens - self.num_computed_tokens

    def max_num_tokens(self, max_model_len: int) -> int:
        """The length at which the sequence ends at the latest."""
        return min(len(self.prompt_token_ids) + self.sampling.max_tokens, max_model_len)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The known tokens at positions [start, stop)."""
        length = len(self.prompt_token_ids)
        if stop <= length:
            return self.prompt_token_ids[start:stop]
        tail = tuple(self.output_token_ids[max(0, start - length) : stop - length])
        return self.prompt_token_ids[start:] + tail

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The chained hashes of the first ``num_blocks`` blocks, all full; computed once each."""
        known = self._block_hashes
        while len(known) < num_blocks:
            parent = known[-1] if known else tenant_root(self.tenant)
            start = len(known) * block_size
            known.append(hash_block(parent, self.tokens(start, start + block_size)))
        return known[:num_blocks]
