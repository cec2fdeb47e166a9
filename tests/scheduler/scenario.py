"""A scheduler over a small pool, asked and answered step by step."""

from __future__ import annotations

from giantserve.request import Request
from giantserve.sampling_params import SamplingParams
from giantserve.scheduler import Scheduler, SchedulerConfig
from giantserve.step import StepPlan
from kvcache.block_pool import BlockPool


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    device: int = 8,
    host: int = 0,
    *,
    seqs: int = 8,
    tokens: int = 64,
    slice_tokens: int = 64,
    passes: int = 1,
    queued: int = 100,
    caching: bool = False,
    rotating: int = 0,
) -> tuple[Scheduler, BlockPool, Clock]:
    pool, clock = BlockPool(device, host, 4, caching, rotating), Clock()
    config = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_slice_tokens=slice_tokens,
        max_model_len=32,
        max_passes_in_flight=passes,
        block_size=4,
        max_queued_requests=queued,
    )
    return Scheduler(config, pool, clock), pool, clock


def request(
    seq_id: int,
    prompt: int | tuple[int, ...],
    *,
    priority: int = 0,
    deadline: float | None = None,
    tenant: str = "",
    end: tuple[int, ...] = (),
    arrival: float | None = None,
    max_tokens: int = 8,
    min_tokens: int = 0,
    prompt_logprobs: int | None = None,
) -> Request:
    sampling = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs
    )
    return Request(
        seq_id=seq_id,
        request_id=f"r{seq_id}",
        prompt_token_ids=tuple(range(prompt)) if isinstance(prompt, int) else prompt,
        sampling=sampling,
        seed=seq_id,
        tenant=tenant,
        priority=priority,
        arrival_s=float(seq_id) if arrival is None else arrival,
        deadline=deadline,
        end_token_ids=end,
    )


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check_integrity()
    return plan


def answer(scheduler: Scheduler, plan: StepPlan, token: int = 50) -> None:
    scheduler.on_result(plan.step_id, {c.seq_id: token for c in plan.chunks if c.sample})
    scheduler.check_integrity()


def step(scheduler: Scheduler) -> StepPlan:
    plan = planned(scheduler)
    answer(scheduler, plan)
    return plan


def spans(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(sequence, first position, tokens) of each chunk."""
    return [(c.seq_id, c.start, len(c.token_ids)) for c in plan.chunks]
