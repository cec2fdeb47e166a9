"""Exact plans where KV binds: prefixes reused, sequences preempted, blocks lost."""

from __future__ import annotations

from giantserve.request import RequestStatus
from giantserve.scheduler import MAX_LOSSES, Scheduler, SchedulerConfig
from kvcache.block_copy import BlockCopy
from kvcache.block_pool import BlockPool, CachedBlock
from kvcache.eviction import NextRequests
from kvcache.tier import Tier
from tests.scheduler.scenario import Clock, answer, make, planned, request, spans, step


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
