"""Any order of arrivals, results and aborts over tiny pools: never a wrong block, always an end."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model_shard import ModelShard, next_token

from giantserve.errors import InvalidRequestError, QueueFullError
from giantserve.request import Request, RequestStatus
from giantserve.sampling_params import SamplingParams
from giantserve.scheduler import Scheduler, SchedulerConfig
from giantserve.step import StepPlan
from kvcache.block_pool import BlockPool
from kvcache.eviction import NextRequests
from kvcache.tier import Tier

MAX_MODEL_LEN = 24


class SchedulerMachine(RuleBasedStateMachine):
    """Plays the engine; `ModelShard` plays the shards and checks every context."""

    totals: ClassVar[Counter[str]] = Counter()

    @initialize(
        num_device=st.integers(4, 20),
        num_host=st.integers(0, 10),
        num_rotating=st.sampled_from([0, 0, 3, 12]),
        block_size=st.integers(1, 4),
        caching=st.booleans(),
        tenant_share=st.sampled_from([1.0, 0.3]),
        passes=st.integers(1, 3),
        max_num_seqs=st.integers(1, 6),
        max_tokens=st.sampled_from([1, 3, 6, 12, 40]),
        slice_tokens=st.sampled_from([2, 5, 40]),
    )
    def start(
        self,
        num_device: int,
        num_host: int,
        num_rotating: int,
        block_size: int,
        caching: bool,
        tenant_share: float,
        passes: int,
        max_num_seqs: int,
        max_tokens: int,
        slice_tokens: int,
    ) -> None:
        self.pool = BlockPool(
            num_device, num_host, block_size, caching, num_rotating, tenant_share, NextRequests()
        )
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            max_slice_tokens=min(slice_tokens, max_tokens),
            max_model_len=MAX_MODEL_LEN,
            max_passes_in_flight=passes,
            block_size=block_size,
            max_queued_requests=8,
        )
        self.now = 0.0
        self.scheduler = Scheduler(self.config, self.pool, lambda: self.now)
        self.requests: dict[int, Request] = {}
        self.open: set[int] = set()
        self.sampling: set[int] = set()
        self.shard = ModelShard(
            num_device + num_rotating,
            num_host,
            block_size,
            self.requests.__getitem__,
            max_slice_tokens=self.config.max_slice_tokens,
            first_rotating=num_device,
        )

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=MAX_MODEL_LEN),
        shared=st.integers(0, 12),
        max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 3),
        tenant=st.sampled_from(["a", "b"]),
        priority=st.integers(0, 2),
        wants_prompt=st.booleans(),
    )
    def add(
        self,
        prompt: list[int],
        shared: int,
        max_tokens: int,
        min_tokens: int,
        tenant: str,
        priority: int,
        wants_prompt: bool,
    ) -> None:
        seq_id = len(self.requests)
        request = Request(
            seq_id=seq_id,
            request_id=f"r{seq_id}",
            prompt_token_ids=tuple([1] * shared + prompt)[:MAX_MODEL_LEN],
            sampling=SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens),
                prompt_logprobs=0 if wants_prompt else None,
            ),
            seed=0,
            tenant=tenant,
            priority=priority,
            arrival_s=self.now,
            end_token_ids=(0,),
        )
        self.now += 1
        self.requests[seq_id] = request
        try:
            self.scheduler.add(request)
            self.open.add(seq_id)
        except InvalidRequestError:
            length = len(request.prompt_token_ids)
            capacity = self.pool.num_active_blocks * self.pool.block_size
            longest = min(length + max_tokens, MAX_MODEL_LEN)
            assert length + 1 > MAX_MODEL_LEN or longest - 1 > capacity
        except QueueFullError:
            assert self.scheduler.num_waiting >= self.config.max_queued_requests

    @rule()
    def schedule(self) -> None:
        self._schedule()

    def _schedule(self) -> StepPlan | None:
        before = self.scheduler.num_preemptions
        plan = self.scheduler.schedule()
        self.totals["preempted"] += self.scheduler.num_preemptions - before
        if plan is None:
            assert self.shard.queue or not self.scheduler.has_work(), "stuck"
            return None
        assert plan.chunks or (plan.finished and not self.shard.queue)
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        sampled = {chunk.seq_id for chunk in plan.chunks if chunk.sample}
        assert not sampled & self.sampling, "two passes sample the same sequence"
        self.sampling |= sampled
        for new in plan.new:
            request = self.requests[new.seq_id]
            if new.output_token_ids:
                start = next(c.start for c in plan.chunks if c.seq_id == new.seq_id)
                decodes = start == request.num_tokens - 1
                self.totals["resumed" if decodes else "recomputed"] += 1
            self.totals["cached"] += request.num_cached_tokens > 0
        self.shard.submit(plan)
        return plan

    @precondition(lambda self: self.shard.queue)
    @rule()
    def result(self) -> None:
        step_id, tokens, lost = self.shard.run_next()
        known = {seq_id: len(self.requests[seq_id].output_token_ids) for seq_id in tokens}
        self.scheduler.on_result(step_id, tokens, lost)
        self.totals["lost"] += len(lost)
        self.sampling -= tokens.keys()
        for seq_id, token in tokens.items():
            request = self.requests[seq_id]
            if seq_id not in self.open:
                self.totals["ignored"] += 1
                assert request.status is RequestStatus.ABORTED
                continue
            if not self.scheduler.took(seq_id, known[seq_id]):
                assert request.num_losses
                self.totals["computed again"] += 1
                continue
            assert request.output_token_ids[-1] == token
            if token == 0 or request.num_tokens == request.max_num_tokens(MAX_MODEL_LEN):
                self.scheduler.finish(seq_id)
                self.open.discard(seq_id)
                self._check_output(request)
                self.totals["finished"] += 1

    @precondition(lambda self: any(self.requests[i].block_ids for i in self.open))
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A block of a running sequence cannot be read any more."""
        held = sorted({block for i in self.open for block in self.requests[i].block_ids})
        block_id = data.draw(st.sampled_from(held))
        if self.shard.memory[Tier.DEVICE][block_id]:
            self.shard.damage(block_id)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.open)))
        self._abort(seq_id)

    @precondition(lambda self: any(self.requests[i].host_block_ids for i in self.open))
    @rule()
    def abort_on_host(self) -> None:
        self._abort(next(i for i in self.open if self.requests[i].host_block_ids))
        self.totals["aborted on host"] += 1

    def _abort(self, seq_id: int) -> None:
        self.scheduler.abort(seq_id)
        self.open.discard(seq_id)

    @rule(
        count=st.integers(2, 6),
        shared=st.integers(0, 10),
        tenant=st.sampled_from(["a", "b"]),
        max_tokens=st.integers(8, 20),
    )
    def burst(self, count: int, shared: int, tenant: str, max_tokens: int) -> None:
        """Several at once with a common prefix and long outputs: what fills pools."""
        for index in range(count):
            self.add([1 + index % 2], shared, max_tokens, 3, tenant, index % 2, index == 3)

    @rule(rounds=st.integers(1, 30))
    def drive(self, rounds: int) -> None:
        """Keep the pipeline full for a while, as the engine does."""
        for _ in range(rounds):
            while self._schedule() is not None:
                pass
            if self.shard.queue:
                self.result()
            self.scheduler.check_integrity()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(100_000):
            if not self.scheduler.has_work() and not self.shard.queue:
                break
            self.drive(1)
        else:
            raise AssertionError("the scheduler does not come to an end")
        assert not self.open
        assert not self.shard.sequences, "the shards keep state of ended sequences"
        assert self.pool.num_free_active_blocks == self.pool.num_active_blocks
        assert self.pool.num_free_host_blocks == self.pool.num_host_blocks
        for (tier, block_id), count in self.shard.copied.items():
            beyond = tier is Tier.DEVICE and block_id >= self.pool.num_device_blocks
            self.totals["to rotating" if beyond else f"to {tier.value}"] += count

    def _check_output(self, request: Request) -> None:
        """Scheduling must not show: the tokens are those of the request alone."""
        tokens = list(request.prompt_token_ids)
        for index, token in enumerate(request.output_token_ids):
            banned = request.end_token_ids if index < request.sampling.min_tokens else ()
            assert token == next_token(request.tenant, tokens, banned)
            tokens.append(token)


EVENTS = (
    "finished",
    "preempted",
    "recomputed",
    "resumed",
    "cached",
    "ignored",
    "aborted on host",
    "to host",
    "to device",
    "to rotating",
    "lost",
    "computed again",
)


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=600,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    missed = [event for event in EVENTS if not SchedulerMachine.totals[event]]
    assert not missed, "the walk proves nothing about what it never met"
