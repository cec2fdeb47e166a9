"""Exact plans for small scenarios: who is in a pass, in which blocks, after which copies."""

from __future__ import annotations

import pytest

from giantserve.errors import ConfigError, InvalidRequestError, QueueFullError
from giantserve.request import Request, RequestStatus
from giantserve.sampling_params import SamplingParams
from giantserve.scheduler import MAX_LOSSES, Scheduler, SchedulerConfig
from giantserve.step import NewSequence, SequenceChunk, StepPlan
from kvcache.block_copy import BlockCopy
from kvcache.block_pool import BlockPool, CachedBlock
from kvcache.eviction import NextRequests
from kvcache.tier import Tier


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


def test_prefill_then_decode_then_finish() -> None:
    scheduler, pool, _ = make()
    asked = request(7, 5)
    scheduler.add(asked)
    plan = planned(scheduler)
    assert plan == StepPlan(
        step_id=0,
        chunks=(SequenceChunk(seq_id=7, start=0, token_ids=(0, 1, 2, 3, 4), sample=True),),
        new=(
            NewSequence(
                seq_id=7,
                prompt_token_ids=(0, 1, 2, 3, 4),
                output_token_ids=(),
                block_ids=(0, 1),
                sampling=asked.sampling,
                seed=7,
            ),
        ),
    )
    assert scheduler.schedule() is None
    answer(scheduler, plan, 11)
    for position in (5, 6, 7):
        assert step(scheduler).chunks[0].new_block_ids == (), f"position {position} has its block"
    last = planned(scheduler)
    assert last.new == ()
    assert last.chunks == (
        SequenceChunk(seq_id=7, start=8, token_ids=(50,), new_block_ids=(2,), sample=True),
    )
    answer(scheduler, last)
    scheduler.finish(7)
    assert asked.status is RequestStatus.FINISHED
    assert asked.output_token_ids == [11, 50, 50, 50, 50]
    assert pool.num_free_device_blocks == 8
    assert scheduler.has_work(), "the shards still keep the sequence"
    assert planned(scheduler) == StepPlan(step_id=5, chunks=(), finished=(7,))
    assert not scheduler.has_work()
    scheduler.on_result(5, {})
    assert scheduler.schedule() is None


def test_chunked_prefill_rides_beside_decodes() -> None:
    scheduler, _, _ = make(tokens=6)
    scheduler.add(request(1, 4))
    scheduler.add(request(2, 10))
    assert spans(step(scheduler)) == [(1, 0, 4), (2, 0, 2)]
    assert spans(step(scheduler)) == [(1, 4, 1), (2, 2, 5)]
    plan = step(scheduler)
    assert spans(plan) == [(1, 5, 1), (2, 7, 3)]
    assert [c.sample for c in plan.chunks] == [True, True]
    assert spans(step(scheduler)) == [(1, 6, 1), (2, 10, 1)]


def test_admission_follows_priority_then_arrival_and_nobody_overtakes() -> None:
    scheduler, _, _ = make(device=4, seqs=2)
    scheduler.add(request(1, 4))
    scheduler.add(request(2, 14, max_tokens=2))
    scheduler.add(request(3, 4))
    scheduler.add(request(4, 4, priority=1))
    assert spans(step(scheduler)) == [(4, 0, 4), (1, 0, 4)]
    scheduler.finish(4)
    # Sequence 2 needs all 4 blocks; 3 would fit, but came later.
    assert spans(step(scheduler)) == [(1, 4, 1)]
    scheduler.finish(1)
    assert spans(step(scheduler)) == [(2, 0, 14)]


def test_decodes_beyond_the_token_budget_take_turns() -> None:
    scheduler, _, _ = make(tokens=2)
    for seq_id in (1, 2):
        scheduler.add(request(seq_id, (3,)))
    step(scheduler)
    scheduler.add(request(3, (3,)))
    for _ in range(2):
        assert spans(step(scheduler))[0][0] == 1, "no room to admit while two decode"
    scheduler.finish(2)
    assert [s[0] for s in spans(step(scheduler))] == [1, 3]


def test_passes_in_flight_share_the_decodes_evenly() -> None:
    scheduler, _, _ = make(device=16, passes=2)
    for seq_id in range(4):
        scheduler.add(request(seq_id, 3))
    first, second = planned(scheduler), planned(scheduler)
    assert [s[0] for s in spans(first)] == [0, 1]
    assert [s[0] for s in spans(second)] == [2, 3]
    assert scheduler.schedule() is None
    answer(scheduler, first)
    third = planned(scheduler)
    assert [s[0] for s in spans(third)] == [0, 1]
    answer(scheduler, second)
    answer(scheduler, third)
    assert [len(planned(scheduler).chunks) for _ in range(2)] == [2, 2], "an emptied pipeline too"


def test_chunks_of_one_prompt_follow_each_other_through_the_pipeline() -> None:
    scheduler, _, _ = make(tokens=4, passes=3)
    scheduler.add(request(1, 10))
    plans = [planned(scheduler) for _ in range(3)]
    assert [spans(plan) for plan in plans] == [[(1, 0, 4)], [(1, 4, 4)], [(1, 8, 2)]]
    assert [plan.chunks[0].sample for plan in plans] == [False, False, True]
    answer(scheduler, plans[0])
    assert scheduler.schedule() is None, "the next token is being sampled"


def test_a_long_prompt_is_cut_into_the_slices_of_one_pass() -> None:
    scheduler, _, _ = make(device=12, tokens=40, slice_tokens=12)
    scheduler.add(request(1, 20, max_tokens=2))
    scheduler.add(request(2, 6, max_tokens=2))
    plan = step(scheduler)
    assert spans(plan) == [(1, 0, 12), (1, 12, 8), (2, 0, 6)]
    assert [chunk.sample for chunk in plan.chunks] == [False, True, True]


def test_a_prompt_that_rotates_has_one_slice_a_pass() -> None:
    pool, clock = BlockPool(2, 0, 4, False, 10), Clock()
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=40,
        max_slice_tokens=12,
        max_model_len=32,
        max_passes_in_flight=1,
        block_size=4,
        max_queued_requests=4,
    )
    scheduler = Scheduler(config, pool, clock)
    scheduler.add(request(1, 20, max_tokens=2))
    assert spans(step(scheduler)) == [(1, 0, 12)]
    assert spans(step(scheduler)) == [(1, 12, 8)]


def test_a_prefix_is_reused_within_the_tenant_but_its_last_token_is_computed() -> None:
    scheduler, _, _ = make(device=12, caching=True)
    scheduler.add(request(1, 8))
    step(scheduler)
    same, stranger, looking = (
        request(2, 8),
        request(3, 8, tenant="other"),
        request(4, 8, prompt_logprobs=1),
    )
    for asked in (same, stranger, looking):
        scheduler.add(asked)
    plan = step(scheduler)
    assert spans(plan) == [(1, 8, 1), (2, 4, 4), (3, 0, 8), (4, 0, 8)]
    assert [new.block_ids for new in plan.new] == [(0, 3), (4, 5), (6, 7)]
    assert [asked.num_cached_tokens for asked in (same, stranger, looking)] == [4, 0, 0]


def test_a_pass_does_not_lean_on_blocks_that_it_fills_itself() -> None:
    scheduler, _, _ = make(device=12, caching=True)
    scheduler.add(request(1, 9))
    scheduler.add(request(2, 9))
    assert spans(step(scheduler)) == [(1, 0, 9), (2, 0, 9)]
    scheduler.add(request(3, 9))
    assert spans(step(scheduler))[-1] == (3, 8, 1)


def test_generated_blocks_are_cached_for_the_next_turn() -> None:
    scheduler, _, _ = make(caching=True)
    first = request(1, 6)
    scheduler.add(first)
    for _ in range(4):
        step(scheduler)
    scheduler.finish(1)
    scheduler.add(request(2, (*first.prompt_token_ids, *first.output_token_ids, 9)))
    assert spans(step(scheduler)) == [(2, 8, 3)]


def to_host(source_id: int, target_id: int) -> BlockCopy:
    return BlockCopy(source=Tier.DEVICE, source_id=source_id, target=Tier.HOST, target_id=target_id)


def test_a_prefix_that_waits_for_its_request_outlives_younger_ones() -> None:
    """The first prompt is cached first and wanted again; the second's blocks go instead."""
    pool, clock = BlockPool(6, 0, 4, True, policy=NextRequests()), Clock()
    config = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_slice_tokens=64,
        max_model_len=32,
        max_passes_in_flight=1,
        block_size=4,
        max_queued_requests=9,
    )
    scheduler = Scheduler(config, pool, clock)
    old, young, other = (tuple(range(start, start + 9)) for start in (0, 20, 40))
    for seq_id, prompt in ((1, old), (2, young)):
        scheduler.add(request(seq_id, prompt, max_tokens=1))
        step(scheduler)
        scheduler.finish(seq_id)
    scheduler.add(request(3, other, max_tokens=1))
    scheduler.add(request(4, old, max_tokens=1))
    assert spans(step(scheduler)) == [(3, 0, 9)]
    scheduler.finish(3)
    assert spans(step(scheduler)) == [(4, 8, 1)]


def test_preemption_moves_the_latest_to_the_host_and_brings_it_back() -> None:
    scheduler, pool, _ = make(device=4, host=2)
    first, second = request(1, 7), request(2, 7)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)  # 4 blocks
    step(scheduler)  # both at 8 tokens of KV
    plan = step(scheduler)
    assert spans(plan) == [(1, 8, 1)]
    assert plan.copies == (to_host(2, 0), to_host(3, 1))
    assert plan.chunks[0].new_block_ids == (3,)
    assert second.status is RequestStatus.PREEMPTED_ON_HOST
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions) == (1, 1, 1)
    assert pool.num_free_host_blocks == 0
    assert spans(step(scheduler)) == [(1, 9, 1)], "3 blocks do not fit beside 3 of 4"
    scheduler.finish(1)
    plan = step(scheduler)
    assert plan.finished == (1,)
    assert spans(plan) == [(2, 8, 1)]
    (new,) = plan.new
    assert new.output_token_ids == (50, 50)
    assert new.block_ids == (2, 3, 1)
    assert plan.chunks[0].new_block_ids == ()
    assert plan.copies == tuple(
        BlockCopy(source=Tier.HOST, source_id=h, target=Tier.DEVICE, target_id=d)
        for h, d in ((0, 2), (1, 3))
    )
    assert pool.num_free_host_blocks == 2


def test_preemption_recomputes_where_the_host_is_full() -> None:
    scheduler, _, _ = make(device=4, host=1)
    second = request(2, 7)
    scheduler.add(request(1, 7))
    scheduler.add(second)
    for _ in range(2):
        step(scheduler)
    scheduler.add(request(3, 1))
    plan = step(scheduler)
    assert plan.copies == ()
    assert (second.status, second.num_computed_tokens) == (RequestStatus.WAITING, 0)
    scheduler.finish(1)
    plan = step(scheduler)
    assert spans(plan) == [(2, 0, 9), (3, 0, 1)], "back at the front of the queue"
    assert plan.chunks[0].token_ids == (0, 1, 2, 3, 4, 5, 6, 50, 50)
    assert plan.new[0].output_token_ids == (50, 50)


def test_priority_decides_who_is_preempted() -> None:
    scheduler, _, _ = make(device=4, host=4)
    scheduler.add(request(1, 7))
    scheduler.add(request(2, 7, priority=1))
    for _ in range(2):
        step(scheduler)
    plan = step(scheduler)
    assert spans(plan) == [(2, 8, 1)]


def test_a_sequence_in_flight_is_never_preempted() -> None:
    scheduler, _, _ = make(device=4, host=4, passes=2)
    scheduler.add(request(1, 7))
    scheduler.add(request(2, 7))
    one, two = planned(scheduler), planned(scheduler)
    answer(scheduler, one)
    one = planned(scheduler)
    answer(scheduler, two)
    two = planned(scheduler)
    answer(scheduler, one)
    assert scheduler.schedule() is None, "1 needs a block and 2, its only victim, is in flight"
    answer(scheduler, two)
    plan = planned(scheduler)
    assert spans(plan) == [(1, 8, 1)]
    assert plan.copies == (to_host(2, 0), to_host(3, 1))


def test_an_abort_frees_at_once_and_late_results_are_ignored() -> None:
    scheduler, pool, _ = make(passes=2)
    gone = request(1, 4)
    scheduler.add(gone)
    plan = planned(scheduler)
    scheduler.abort(1)
    scheduler.abort(1)
    scheduler.check_integrity()
    assert gone.status is RequestStatus.ABORTED
    assert pool.num_free_device_blocks == 8
    scheduler.add(request(2, 4))
    following = planned(scheduler)
    assert following.finished == (1,)
    answer(scheduler, plan)
    assert gone.output_token_ids == []
    scheduler.add(request(3, 4))
    scheduler.abort(3)
    answer(scheduler, following)
    assert planned(scheduler).finished == (), "the shards never met sequence 3"


def test_end_tokens_are_barred_until_min_tokens() -> None:
    scheduler, _, _ = make()
    scheduler.add(request(1, 3, min_tokens=2, end=(7, 9)))
    banned = [step(scheduler).chunks[0].banned_token_ids for _ in range(3)]
    assert banned == [(7, 9), (7, 9), ()]


def test_expired_requests_are_those_never_admitted() -> None:
    scheduler, _, clock = make(seqs=1)
    scheduler.add(request(1, 4, deadline=5.0))
    step(scheduler)
    late, patient = request(2, 4, deadline=5.0), request(3, 4)
    scheduler.add(late)
    scheduler.add(patient)
    clock.now = 4.9
    assert scheduler.expired() == ()
    clock.now = 5.0
    assert scheduler.expired() == (late,)
    scheduler.abort(2)
    assert scheduler.expired() == ()


def test_add_refuses_what_can_never_run() -> None:
    scheduler, _, _ = make(device=4, queued=1)
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        scheduler.add(request(1, 0))
    with pytest.raises(InvalidRequestError, match="prompt has 32 tokens, but the context holds 32"):
        scheduler.add(request(1, 32))
    with pytest.raises(InvalidRequestError, match="KV of 17 tokens, but the tiers hold 16"):
        scheduler.add(request(1, 10, max_tokens=8))
    scheduler.add(request(1, 10, max_tokens=7))
    with pytest.raises(QueueFullError, match="1 sequences wait already, the limit is 1"):
        scheduler.add(request(2, 4))
    assert spans(step(scheduler)) == [(1, 0, 10)]


def test_wrong_results_and_limits_are_refused() -> None:
    scheduler, pool, clock = make()
    with pytest.raises(ValueError, match="step 3 is not in flight"):
        scheduler.on_result(3, {})
    scheduler.add(request(1, 4))
    plan = planned(scheduler)
    with pytest.raises(ValueError, match="step 0 brought no token for sequence 1"):
        scheduler.on_result(plan.step_id, {})
    limits = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 1,
        "max_slice_tokens": 1,
        "max_model_len": 1,
        "max_passes_in_flight": 1,
        "block_size": 8,
        "max_queued_requests": 1,
    }
    with pytest.raises(ConfigError, match="block_size is 8, but the pool's blocks hold 4"):
        Scheduler(SchedulerConfig(**limits), pool, clock)
    with pytest.raises(ConfigError, match="max_num_seqs is 0; it must be at least 1"):
        SchedulerConfig(**(limits | {"max_num_seqs": 0}))


def test_lost_blocks_are_computed_again_by_all_who_lean_on_them() -> None:
    scheduler, _, _ = make(device=12, caching=True)
    shared = tuple(range(8))
    scheduler.add(request(1, (*shared, 20)))
    scheduler.schedule()
    scheduler.on_result(0, {1: 7})
    scheduler.add(request(2, (*shared, 21)))
    scheduler.add(request(3, (50, 51)))
    plan = scheduler.schedule()
    assert plan is not None and [chunk.seq_id for chunk in plan.chunks] == [1, 2, 3]
    second = plan.new[0].block_ids[1]
    lost = CachedBlock(Tier.DEVICE, second)
    scheduler.on_result(1, {1: 8, 2: 8, 3: 8}, [lost])
    assert [scheduler.took(seq_id, count) for seq_id, count in ((1, 1), (2, 0), (3, 0))] == [
        False,
        False,
        True,
    ]
    scheduler.check_integrity()
    # the first block of the prefix is still good, the second is computed again
    plan = scheduler.schedule()
    assert plan is not None
    starts = {chunk.seq_id: (chunk.start, len(chunk.token_ids)) for chunk in plan.chunks}
    assert starts == {3: (2, 1), 1: (4, 6), 2: (4, 5)}
    assert scheduler.given_up() == ()
    for step_id in range(2, 2 * MAX_LOSSES):
        table = next(r.block_ids for r in scheduler._running if r.seq_id == 1)
        scheduler.on_result(step_id, {1: 8, 2: 8, 3: 8}, [CachedBlock(Tier.DEVICE, table[-1])])
        if scheduler.given_up():
            break
        scheduler.schedule()
    assert [r.seq_id for r in scheduler.given_up()] == [1]
    scheduler.abort(1)
    assert scheduler.given_up() == ()
    scheduler.check_integrity()


def test_lost_blocks_are_found_where_later_copies_brought_them() -> None:
    """An unfinished block moves from the disk to the host, and in the next plan to the device,
    before it is known that the disk had lost it."""
    scheduler, _, _ = make(device=1, host=1, passes=2, rotating=2)
    moved = request(3, 1)
    for asked in (request(1, 3), request(2, 4), moved):
        scheduler.add(asked)
    plans = [planned(scheduler) for _ in range(2)]
    assert moved.block_ids == [2]
    answer(scheduler, plans[0])
    plans.append(planned(scheduler))
    answer(scheduler, plans[1])
    plans.append(planned(scheduler))
    assert plans[3].copies == (to_host(2, 0),)
    answer(scheduler, plans[2])
    scheduler.finish(1)
    plans.append(planned(scheduler))
    assert spans(plans[4]) == [(3, 1, 1)]
    assert plans[4].copies == (
        BlockCopy(source=Tier.HOST, source_id=0, target=Tier.DEVICE, target_id=0),
    )
    lost = [CachedBlock(Tier.DEVICE, 2), CachedBlock(Tier.HOST, 0)]
    scheduler.on_result(3, {2: 50}, lost)
    answer(scheduler, plans[4])
    assert moved.output_token_ids == [50], "the second was made of what was lost"
    assert moved.num_computed_tokens == 0
