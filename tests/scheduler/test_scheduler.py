"""Exact plans for small scenarios: who is in a pass, in which blocks, after which copies."""

from __future__ import annotations

import pytest

from giantserve.errors import ConfigError, InvalidRequestError, QueueFullError
from giantserve.request import RequestStatus
from giantserve.scheduler import Scheduler, SchedulerConfig
from giantserve.step import NewSequence, SequenceChunk, StepPlan
from kvcache.block_pool import BlockPool
from tests.scheduler.scenario import Clock, answer, make, planned, request, spans, step


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
