"""Decides what every pass computes: continuous batching over the blocks of a pool."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from giantserve.errors import ConfigError, InvalidRequestError, QueueFullError
from giantserve.request import Request, RequestStatus
from giantserve.request_queue import RequestQueue
from giantserve.scheduler_config import SchedulerConfig as SchedulerConfig
from giantserve.step import NewSequence, SequenceChunk, StepPlan
from kvcache.block_pool import BlockPool, CachedBlock, after_copies
from kvcache.tier import Tier

LOOK_AHEAD = 8
"""Of how many waiting requests the prefixes are known to be wanted."""

MAX_LOSSES = 3
"""How often the KV of a request may be lost before its disk is to blame."""


@dataclass(slots=True)
class _Draft:
    """A step plan in the making."""

    step_id: int
    num_tokens_left: int
    num_sequences: int = 0
    chunks: list[SequenceChunk] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    filled: list[tuple[Request, int, int]] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """Plans passes for the requests it was given; the pool is its own from then on.

    Within a pass: decodes first (the one scheduled longest ago first), then prompts under way, then
    admissions in the order of `Request.rank`, which nobody overtakes. A request is admitted when
    the blocks for all its known tokens are free, so only decodes grow, one block at a time. When
    none is free, the last-ranked request behind the one that grows, and with no pass in flight, is
    preempted: its KV moves to host blocks, or is dropped and recomputed where the host is full.

    It always gets on: with nothing in flight the first-ranked running request may preempt all
    others, and with none running all device and rotating blocks are free; `add` refuses what does
    not fit there alone.

    The caller hands every plan to the shards in order, and every result to `on_result`. Not
    thread-safe.
    """

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, clock: Callable[[], float]
    ) -> None:
        if config.block_size != pool.block_size:
            raise ConfigError(
                f"block_size is {config.block_size}, but the pool's blocks hold {pool.block_size} "
                "tokens; give both the same"
            )
        self._config = config
        self._pool = pool
        self._clock = clock
        self._requests: dict[int, Request] = {}
        self._waiting = RequestQueue()
        self._running = RequestQueue()
        self._in_flight: dict[int, StepPlan] = {}
        self._filled: dict[int, list[tuple[int, list[bytes]]]] = {}
        self._finished: list[int] = []
        self._next_step_id = 0
        self._seen_ahead: tuple[tuple[int, int], ...] = ()
        self.num_preemptions = 0
        self.num_losses = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold device or rotating blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Passes planned and not answered yet."""
        return len(self._in_flight)

    def has_work(self) -> bool:
        """Whether a request is open, or the shards still keep state of one that ended."""
        return bool(self._requests or self._finished)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises QueueFullError where ``max_queued_requests`` wait already, InvalidRequestError for a
        prompt that leaves no room for a token or a request whose KV could outgrow the device and
        rotating blocks.
        """
        assert request.seq_id not in self._requests, f"sequence {request.seq_id} exists"
        self._check_length(request)
        if len(self._waiting) >= self._config.max_queued_requests:
            raise QueueFullError(
                f"{len(self._waiting)} sequences wait already, the limit is "
                f"{self._config.max_queued_requests}; retry later"
            )
        self._requests[request.seq_id] = request
        self._waiting.add(request)

    def abort(self, seq_id: int) -> None:
        """Drop a request; results still to come for it are ignored. Unknown ids are, too."""
        self._end(seq_id, RequestStatus.ABORTED)

    def finish(self, seq_id: int) -> None:
        """End a request that has all its tokens and free its blocks. Unknown ids are ignored."""
        self._end(seq_id, RequestStatus.FINISHED)

    def expired(self) -> tuple[Request, ...]:
        """Requests never admitted whose deadline has passed; they wait on until aborted."""
        now = self._clock()
        return tuple(
            request
            for request in self._waiting
            if request.deadline is not None and request.deadline <= now and not request.on_shards
        )

    def schedule(self) -> StepPlan | None:
        """Plan the next pass; None when there is nothing to do before a result comes or a request
        is added.

        A plan without chunks only tells idle shards what to drop; it is answered like any other.
        """
        if len(self._in_flight) >= self._config.max_passes_in_flight:
            return None
        self._look_ahead()
        draft = _Draft(self._next_step_id, self._config.max_num_batched_tokens)
        self._add_decodes(draft)
        self._add_prompts(draft)
        if not draft.preempted:
            self._admit(draft)
        if not draft.chunks and (self._in_flight or not self._finished):
            return None
        self._cache_filled(draft)
        plan = StepPlan(
            step_id=draft.step_id,
            chunks=tuple(draft.chunks),
            new=tuple(draft.new),
            copies=self._pool.take_copies(),
            finished=tuple(self._finished),
        )
        self._finished.clear()
        self._next_step_id += 1
        self._in_flight[plan.step_id] = plan
        return plan

    def on_result(
        self,
        step_id: int,
        sampled: Mapping[int, int],
        lost: Collection[CachedBlock] = (),
    ) -> StepPlan:
        """Record that a pass is done: ``sampled`` maps sequence to token for its sampling chunks.

        Tokens of requests that ended meanwhile are ignored, and so are those of requests whose KV
        was in a ``lost`` block, which compute it again: `took` tells which count. Returns the plan
        answered. Raises ValueError for a step not in flight and for a live sequence whose token is
        missing.
        """
        plan = self._in_flight.pop(step_id, None)
        if plan is None:
            raise ValueError(f"step {step_id} is not in flight; in flight are {[*self._in_flight]}")
        if lost:
            later = [copy for each in self._in_flight.values() for copy in each.copies]
            self._lose({*after_copies(lost, plan.copies, later), *self._left_by_ended()})
            self._pool.count_losses(set(lost))
        self._filled.pop(step_id, None)
        for chunk in plan.chunks:
            request = self._requests.get(chunk.seq_id)
            if request is None:
                continue
            request.num_passes_in_flight -= 1
            if request.is_lost:
                if request.num_passes_in_flight == 0:
                    self._recompute(request)
            elif chunk.sample:
                if chunk.seq_id not in sampled:
                    raise ValueError(f"step {step_id} brought no token for sequence {chunk.seq_id}")
                request.output_token_ids.append(sampled[chunk.seq_id])
        return plan

    def took(self, seq_id: int, num_output_tokens: int) -> bool:
        """Whether a live request has more than ``num_output_tokens``: its last token counted."""
        request = self._requests.get(seq_id)
        return request is not None and len(request.output_token_ids) > num_output_tokens

    def distrust(self, seq_id: int) -> None:
        """No later prompt may match what a live request has computed."""
        blocks = self._requests[seq_id].block_ids
        self._pool.forget([CachedBlock(Tier.DEVICE, block_id) for block_id in blocks])

    def given_up(self) -> tuple[Request, ...]:
        """Requests whose KV was lost `MAX_LOSSES` times; they try on until aborted."""
        return tuple(r for r in self._requests.values() if r.num_losses >= MAX_LOSSES)

    def check_integrity(self) -> None:
        """Assert that queues, statuses, blocks and passes in flight agree, and so does the pool."""
        running, waiting = list(self._running), list(self._waiting)
        assert {r.seq_id for r in running} | {r.seq_id for r in waiting} == set(self._requests)
        assert len(running) + len(waiting) == len(self._requests), "a request is queued twice"
        assert len(running) <= self._config.max_num_seqs
        for request in running:
            assert request.status is RequestStatus.RUNNING
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert len(request.block_ids) >= self._pool.num_blocks_for(request.num_computed_tokens)
            assert not request.host_block_ids
        for request in waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED_ON_HOST)
            assert not request.block_ids
            held = len(request.host_block_ids)
            assert held == self._pool.num_blocks_for(request.num_computed_tokens)
        in_flight = Counter(c.seq_id for plan in self._in_flight.values() for c in plan.chunks)
        for request in self._requests.values():
            assert request.num_passes_in_flight == in_flight[request.seq_id]
        self._pool.check_integrity(
            Counter(block_id for r in running for block_id in r.block_ids),
            Counter(block_id for r in waiting for block_id in r.host_block_ids),
        )

    def _left_by_ended(self) -> list[CachedBlock]:
        """What passes in flight put into the cache for requests that have ended: they may have
        computed it from lost blocks, and nobody holds these any more to tell."""
        return [
            block
            for filled in self._filled.values()
            for seq_id, hashes in filled
            if seq_id not in self._requests
            for block_hash in hashes
            for block in self._pool.find(block_hash)
        ]

    def _lose(self, lost: Collection[CachedBlock]) -> None:
        """Find all whose KV depends on ``lost`` blocks: theirs from the first such block on is
        worthless, too, and so is what others took from it."""
        known: set[CachedBlock] = set()
        spreading = set(lost)
        while spreading > known:
            known = self._pool.forget(spreading)
            spreading = set(known)
            for request in self._requests.values():
                held = [CachedBlock(Tier.DEVICE, b) for b in request.block_ids]
                held += [CachedBlock(Tier.HOST, b) for b in request.host_block_ids]
                first = next((i for i, block in enumerate(held) if block in known), None)
                if first is not None:
                    spreading.update(held[first:])
                    if not request.is_lost:
                        request.num_losses += 1
                        self.num_losses += 1
                    request.is_lost = True
        for request in [r for r in self._requests.values() if r.is_lost]:
            if request.num_passes_in_flight == 0:
                self._recompute(request)

    def _recompute(self, request: Request) -> None:
        """Start over with the tokens that are known; what is still cached of them is found."""
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
            self._pool.free(request.block_ids)
            request.block_ids = []
        else:
            self._waiting.remove(request)
            self._pool.free_host(request.host_block_ids)
            request.host_block_ids = []
        request.is_lost = False
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self._waiting.add(request)

    def _check_length(self, request: Request) -> None:
        config = self._config
        length = len(request.prompt_token_ids)
        if length < 1:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if length + 1 > config.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, but the context holds {config.max_model_len}, "
                "at least one of them for the output; shorten the prompt"
            )
        # the last token is never fed back: it has no KV
        needed = request.max_num_tokens(config.max_model_len) - 1
        limit = self._pool.num_active_blocks * self._pool.block_size
        if needed > limit:
            raise InvalidRequestError(
                f"prompt and max_tokens need the KV of {needed} tokens, but the tiers hold "
                f"{limit}; shorten the prompt, lower max_tokens or give KV more memory"
            )

    def _add_decodes(self, draft: _Draft) -> None:
        """One token of each sequence that has its last one, dealt evenly over the passes."""
        limit = -(-len(self._running) // self._config.max_passes_in_flight)
        ready = [r for r in self._running if r.num_tokens_to_compute == 1 and not r.is_lost]
        ready.sort(key=lambda request: request.last_step_id)
        for request in ready:
            if draft.num_tokens_left == 0 or draft.num_sequences == limit:
                return
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for one before it
            new_block_ids = self._grow(request, draft)
            if new_block_ids is not None:
                self._add_chunks(request, draft, new_block_ids)

    def _add_prompts(self, draft: _Draft) -> None:
        """The next tokens of prompts under way."""
        for request in self._running:
            if draft.num_tokens_left == 0:
                return
            if request.num_tokens_to_compute > 1 and not request.is_lost:
                self._add_chunks(request, draft)

    def _admit(self, draft: _Draft) -> None:
        """Start or resume waiting requests in order, until one does not fit."""
        config = self._config
        expected = min(config.max_num_seqs, len(self._running) + len(self._waiting))
        limit = -(-expected // config.max_passes_in_flight)
        while (
            len(self._waiting)
            and len(self._running) < config.max_num_seqs
            and draft.num_sequences < limit
            and draft.num_tokens_left > 0
        ):
            request = self._waiting.head
            block_ids = self._place(request)
            if block_ids is None:
                return
            self._waiting.remove(request)
            self._running.add(request)
            request.status = RequestStatus.RUNNING
            request.block_ids = block_ids
            request.host_block_ids = []
            request.on_shards = True
            draft.new.append(
                NewSequence(
                    seq_id=request.seq_id,
                    prompt_token_ids=request.prompt_token_ids,
                    output_token_ids=tuple(request.output_token_ids),
                    block_ids=tuple(block_ids),
                    sampling=request.sampling,
                    seed=request.seed,
                )
            )
            self._add_chunks(request, draft)

    def _place(self, request: Request) -> list[int] | None:
        """Blocks for all known tokens of a waiting request, holding what KV there is."""
        num_blocks = self._pool.num_blocks_for(request.num_tokens)
        if request.status is RequestStatus.PREEMPTED_ON_HOST:
            host_ids = request.host_block_ids
            return self._pool.swap_in(host_ids, num_blocks - len(host_ids))
        prefix = self._match(request)
        block_ids = self._pool.allocate(num_blocks - len(prefix), prefix)
        if block_ids is not None:
            request.num_computed_tokens = len(prefix) * self._pool.block_size
            if not request.on_shards:
                request.num_cached_tokens = request.num_computed_tokens
                self.num_prompt_tokens += len(request.prompt_token_ids)
                self.num_cached_tokens += request.num_cached_tokens
        return block_ids

    def _match(self, request: Request) -> tuple[CachedBlock, ...]:
        """Cached KV of a prefix that leaves at least the last known token to compute."""
        wants_prompt = request.sampling.prompt_logprobs is not None and not request.output_token_ids
        if wants_prompt or not self._pool.enable_prefix_caching:
            return ()
        block_size = self._pool.block_size
        num_full = (request.num_tokens - 1) // block_size
        return self._pool.match_prefix(request.block_hashes(num_full, block_size))

    def _look_ahead(self) -> None:
        """Tell the pool what the requests that are admitted next would find in it."""
        coming = list(itertools.islice(self._waiting, LOOK_AHEAD))
        known = tuple((request.seq_id, request.num_tokens) for request in coming)
        if known != self._seen_ahead and self._pool.enable_prefix_caching:
            self._seen_ahead = known
            block_size = self._pool.block_size
            self._pool.expect(
                [r.block_hashes((r.num_tokens - 1) // block_size, block_size) for r in coming]
            )

    def _grow(self, request: Request, draft: _Draft) -> tuple[int, ...] | None:
        """The block that one more token needs, or (); None where it must wait for others."""
        if self._pool.num_blocks_for(request.num_tokens) == len(request.block_ids):
            return ()
        while (block_ids := self._pool.allocate(1)) is None:
            victim = self._victim_behind(request)
            if victim is None:
                return None
            self._preempt(victim)
            draft.preempted = True
        request.block_ids.extend(block_ids)
        return tuple(block_ids)

    def _victim_behind(self, request: Request) -> Request | None:
        for candidate in reversed(self._running):
            if candidate is request:
                return None
            if candidate.num_passes_in_flight == 0:
                return candidate
        raise AssertionError(f"sequence {request.seq_id} is not running")

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks away; its KV goes to the host if that has room."""
        num_computed = self._pool.num_blocks_for(request.num_computed_tokens)
        computed, rest = request.block_ids[:num_computed], request.block_ids[num_computed:]
        self._pool.free(rest)
        host_ids = self._pool.swap_out(computed)
        if host_ids is None:
            self._pool.free(computed)
            request.num_computed_tokens = 0
            request.status = RequestStatus.WAITING
        else:
            request.host_block_ids = host_ids
            request.status = RequestStatus.PREEMPTED_ON_HOST
        request.block_ids = []
        self._running.remove(request)
        self._waiting.add(request)
        self.num_preemptions += 1

    def _add_chunks(
        self, request: Request, draft: _Draft, new_block_ids: tuple[int, ...] = ()
    ) -> None:
        """As many of a running request's tokens as the pass has room for, in chunks of a slice at
        most."""
        assert request.num_tokens < request.max_num_tokens(self._config.max_model_len), (
            f"sequence {request.seq_id} is at its end but was not finished"
        )
        draft.num_sequences += 1
        request.last_step_id = draft.step_id
        self._add_chunk(request, draft, new_block_ids)
        while draft.num_tokens_left and request.num_tokens_to_compute:
            if max(request.block_ids) >= self._pool.num_device_blocks:
                return  # what rotates is not home again when the next slice would read it
            self._add_chunk(request, draft)

    def _add_chunk(
        self, request: Request, draft: _Draft, new_block_ids: tuple[int, ...] = ()
    ) -> None:
        start = request.num_computed_tokens
        room = min(draft.num_tokens_left, self._config.max_slice_tokens)
        stop = start + min(request.num_tokens_to_compute, room)
        sample = stop == request.num_tokens
        barred = sample and len(request.output_token_ids) < request.sampling.min_tokens
        draft.chunks.append(
            SequenceChunk(
                seq_id=request.seq_id,
                start=start,
                token_ids=request.tokens(start, stop),
                new_block_ids=new_block_ids,
                sample=sample,
                banned_token_ids=request.end_token_ids if barred else (),
            )
        )
        draft.filled.append((request, start, stop))
        draft.num_tokens_left -= stop - start
        request.num_computed_tokens = stop
        request.num_passes_in_flight += 1

    def _cache_filled(self, draft: _Draft) -> None:
        """Make the blocks that this pass fills findable: by later passes, not by this one."""
        block_size = self._pool.block_size
        for request, start, stop in draft.filled if self._pool.enable_prefix_caching else ():
            first, end = start // block_size, stop // block_size
            if first < end:
                hashes = request.block_hashes(end, block_size)[first:]
                self._pool.cache_full_blocks(request.block_ids[first:end], hashes)
                self._filled.setdefault(draft.step_id, []).append((request.seq_id, hashes))

    def _end(self, seq_id: int, status: RequestStatus) -> None:
        request = self._requests.pop(seq_id, None)
        if request is None:
            return
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
            self._pool.free(request.block_ids)
            request.block_ids = []
        else:
            self._waiting.remove(request)
            self._pool.free_host(request.host_block_ids)
            request.host_block_ids = []
        if request.on_shards:
            self._finished.append(seq_id)
        request.status = status
