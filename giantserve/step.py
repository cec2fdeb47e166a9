"""What the engine and the shards say to each other once a pass. Frozen, tensor-free, picklable."""

from __future__ import annotations

from dataclasses import dataclass

from giantserve.outputs import PositionLogprobs
from giantserve.sampling_params import SamplingParams
from kvcache.block_copy import BlockCopy as BlockCopy
from kvcache.block_pool import CachedBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A sequence the shards have not seen, or one that comes back after preemption (it replaces the
    old)."""

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceChunk:
    """One sequence's tokens in this pass: positions ``start`` to ``start + len(token_ids)``.

    ``new_block_ids`` extend the block table that the shards keep. ``sample``: the last position's
    logits choose a token. ``banned_token_ids`` may not be sampled now (the end tokens, until
    ``min_tokens`` is reached).
    """

    seq_id: int
    start: int
    token_ids: tuple[int, ...]
    new_block_ids: tuple[int, ...] = ()
    sample: bool = False
    banned_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One pass. ``finished`` are the sequences whose state the shards drop first."""

    step_id: int
    chunks: tuple[SequenceChunk, ...]
    new: tuple[NewSequence, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    finished: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """The token chosen for one sequence in a pass; ``logprobs`` where the request asked for them.
    Means nothing where ``overflowed``: the logits were not finite."""

    seq_id: int
    token_id: int
    logprobs: PositionLogprobs | None = None
    overflowed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the last stage's first rank returns for a pass.

    ``prompt_logprobs[seq_id]`` are those of the positions that follow the pass's tokens within the
    prompt: entry i belongs to prompt token ``start + i + 1``, of its first chunk. ``lost`` are
    blocks whose content a tier lost: whatever the pass computed from them is worthless.
    """

    step_id: int
    tokens: tuple[SampledToken, ...]
    prompt_logprobs: dict[int, tuple[PositionLogprobs, ...]]
    elapsed_s: float
    lost: tuple[CachedBlock, ...] = ()
