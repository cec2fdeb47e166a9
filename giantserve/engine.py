"""The engine: one thread that schedules passes, runs them on the shards and hands out tokens."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from giantserve.config import EngineConfig
from giantserve.end_tokens import read_end_token_ids
from giantserve.engine_stats import EngineStats
from giantserve.errors import (
    ConfigError,
    EngineDeadError,
    GiantserveError,
    InvalidRequestError,
    KVLostError,
)
from giantserve.executor.base import Executor
from giantserve.executor.launcher import Launcher, run_beside
from giantserve.executor.messages import LoadProgress
from giantserve.executor.select import make_executor
from giantserve.outputs import StreamDelta, Usage
from giantserve.planning import Resolution, resolve
from giantserve.request import Request
from giantserve.sampling_params import SamplingParams
from giantserve.scheduler import Scheduler, SchedulerConfig
from giantserve.sequence_output import SequenceOutput
from giantserve.step import StepResult
from giantserve.tokenizer import Tokenizer, load_tokenizer
from giantserve.trace_file import write_trace
from kvcache.block_pool import BlockPool
from kvcache.eviction import NextRequests
from kvcache.tier import Tier
from partition.plan import PartitionPlan

logger = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 60.0
Sink = Callable[[StreamDelta | GiantserveError], None]
"""Takes a request's deltas in order, called from the engine's thread; an error is the last thing it
takes."""


@dataclass(slots=True, kw_only=True)
class _Choice:
    """One sequence of a request."""

    request: Request
    output: SequenceOutput
    prompt_logprobs: list[Any] | None
    index: int


@dataclass(slots=True, kw_only=True)
class _Ticket:
    """A request as the engine tracks it until its last choice ends."""

    request_id: str
    sink: Sink
    choices: dict[int, _Choice] = field(default_factory=dict)
    completion_tokens: int = 0


def _run_all(actions: Sequence[Callable[[], None]]) -> None:
    for action in actions:
        action()


def unused_tiers(config: EngineConfig, plan: PartitionPlan) -> list[str]:
    """A line for each tier that was asked for and holds nothing: an offload that silently does
    nothing is worse than none."""
    asked = {
        Tier.HOST: ("host_memory", config.host_memory),
        Tier.NVME: ("nvme_dir", config.nvme_dir),
    }
    return [
        f"{option} is {value}, but nothing lies on the {tier.value} tier: the plan does without it"
        for tier, (option, value) in asked.items()
        if value and not sum(shard.used_bytes(tier) for shard in plan.shards)
    ]


def _load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """In a process that has transformers' models imported, if there is one: choosing among the
    tokenizers needs them, using one does not. A checkpoint's own code is imported where it is
    used."""
    if config.trust_remote_code:
        return load_tokenizer(config.model, trust_remote_code=True)
    try:
        return run_beside(load_tokenizer, config.model)
    except pickle.PicklingError:
        return load_tokenizer(config.model)


class Engine:
    """Runs one replica. Construction blocks until the model is loaded; `close` ends it.

    ``plan`` is run in place of the planner's own; ``resolution`` is what `resolve` answers, where
    it was asked before; ``launcher`` starts the workers and outlives the engine. `submit` and
    `abort` may be called from any thread. ``flush`` is called from the engine's thread once the
    sinks have been fed what a pass brought and the next pass runs, so that a sink can collect.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        plan: PartitionPlan | None = None,
        resolution: Resolution | None = None,
        on_progress: Callable[[int, LoadProgress], None] = lambda rank, progress: None,
        launcher: Launcher | None = None,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        resolution = resolution or resolve(config)
        self.config, self.profile = resolution.config, resolution.profile
        self.plan = plan or resolution.plan
        logger.info("plan: %s", self.plan.reason)
        keeps = config.enable_prefix_caching and self.plan.num_rotating_nvme_blocks > 0
        if config.prefix_memory is not None and not keeps:
            raise ConfigError(
                f"prefix_memory is {config.prefix_memory} bytes, but no block of KV can be kept: "
                "that takes prefix caching and room for a block; raise it or leave it out"
            )
        for line in unused_tiers(config, self.plan):
            logger.info("%s", line)
        self.end_token_ids = tuple(sorted(read_end_token_ids(config.model)))
        self._pool = BlockPool(
            self.plan.num_device_blocks,
            self.plan.num_host_blocks,
            self.plan.block_size,
            config.enable_prefix_caching,
            self.plan.num_rotating_host_blocks + self.plan.num_rotating_nvme_blocks,
            config.tenant_prefix_share,
            NextRequests(),
        )
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=self.plan.max_num_seqs,
                max_num_batched_tokens=self.plan.max_num_batched_tokens,
                max_slice_tokens=self.plan.max_slice_tokens,
                max_model_len=self.plan.max_model_len,
                max_passes_in_flight=self.plan.passes_in_flight,
                block_size=self.plan.block_size,
                max_queued_requests=config.max_queued_requests,
            ),
            self._pool,
            time.monotonic,
        )
        with ThreadPoolExecutor(1) as beside:  # a tokenizer takes as long as the workers' imports
            tokenizer = beside.submit(_load_tokenizer, config)
            self._executor: Executor = make_executor(self.config, self.plan, on_progress, launcher)
        try:
            self.tokenizer = tokenizer.result()
        except BaseException:
            self._executor.close()
            raise
        self._pool.adopt(self._executor.kept)
        self._ids = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._held = threading.local()
        self._tickets: dict[str, _Ticket] = {}
        self._by_sequence: dict[int, _Ticket] = {}
        self._in_flight = 0
        self._flush = flush
        self._failure: GiantserveError | None = None
        self._stopping = False
        self.counters = EngineStats(resolution.bandwidths)
        self._asking: list[queue.SimpleQueue[dict[str, Any] | GiantserveError]] = []
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.config.served_model_name or self.config.model

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt and output together."""
        return self.plan.max_model_len

    # Called from any thread

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        tenant: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> None:
        """Queue a request; its deltas, or one error, go to ``sink``.

        Raises EngineDeadError, and InvalidRequestError for token ids outside the vocabulary.
        """
        params.check_vocab(self.profile.vocab_size)
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        outside = [t for t in prompt_token_ids if not 0 <= t < self.profile.vocab_size]
        if outside:
            raise InvalidRequestError(
                f"token id {outside[0]} is outside the vocabulary of {self.profile.vocab_size}"
            )
        arrival = time.monotonic()
        self._enqueue(
            lambda: self._admit(
                request_id,
                tuple(prompt_token_ids),
                params,
                sink,
                tenant,
                priority,
                arrival,
                deadline_s,
            )
        )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this thread submits within is admitted at once, between two passes: which prompts a
        pass reads together is then the same whenever they are. Where the body raises, none is."""
        actions: list[Callable[[], None]] = []
        self._held.actions = actions
        try:
            yield
        finally:
            del self._held.actions
        self._enqueue(lambda: _run_all(actions))

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; nothing more goes to its sink."""
        with contextlib.suppress(EngineDeadError):  # then there is nothing left to drop
            self._enqueue(lambda: self._abort(request_id))

    def stats(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Plain data on queues, KV blocks, tokens, and bytes by tier and direction on every
        shard."""
        if self._failure is not None:
            raise EngineDeadError(str(self._failure))
        answer: queue.SimpleQueue[dict[str, Any] | GiantserveError] = queue.SimpleQueue()
        self._enqueue(lambda: self._collect(answer))
        try:
            values = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineDeadError(f"the engine did not answer within {timeout_s:.0f} s") from None
        if isinstance(values, GiantserveError):
            raise values
        return values

    @property
    def failure(self) -> GiantserveError | None:
        """What ended the engine, or None while it is well."""
        return self._failure

    def close(self) -> None:
        """End the engine and its shards; open requests get EngineDeadError. Idempotent."""
        self._stopping = True
        self._executor.wake()
        self._thread.join()
        self._executor.close()
        if self.config.trace is not None:
            write_trace(self.config.trace, self.plan, self._executor.spans)

    def _enqueue(self, action: Callable[[], None]) -> None:
        """Have the engine's thread run ``action``; raises EngineDeadError where there is none."""
        with self._ending:
            if self._failure is not None:
                raise EngineDeadError(str(self._failure))
            held: list[Callable[[], None]] | None = getattr(self._held, "actions", None)
            if held is not None:
                held.append(action)
                return
            self._inbox.put(action)
        self._executor.wake()

    # The engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._drain_inbox()
                self._fill_pipeline()
                self._flush()
                for result in self._executor.results(None if self._in_flight else IDLE_TIMEOUT_S):
                    self._in_flight -= 1
                    self._take(result)
                self._fail_expired()
                self._fail_lost()
                self._answer_stats()
            self._keep_prefixes()
            self._end(EngineDeadError("the engine was closed"))
        except GiantserveError as error:
            self._end(error)
        except Exception as error:
            logger.exception("the engine failed")
            self._end(EngineDeadError(f"the engine failed: {type(error).__name__}: {error}"))

    def _keep_prefixes(self) -> None:
        """Leave cached KV to a later engine, if the config says so."""
        if self.config.prefix_memory is None:
            return
        while self._in_flight:
            for result in self._executor.results(None):
                self._in_flight -= 1
                self._take(result)
        for seq_id in self._by_sequence:
            self._scheduler.abort(seq_id)
        plan = self.plan
        hashes = self._pool.keep(plan.num_device_blocks + plan.num_rotating_host_blocks)
        self._executor.keep(self._pool.take_copies(), hashes)

    def _drain_inbox(self) -> None:
        while True:
            try:
                action = self._inbox.get_nowait()
            except queue.Empty:
                return
            action()

    def _fill_pipeline(self) -> None:
        while (plan := self._scheduler.schedule()) is not None:
            self._executor.submit(plan)
            self.counters.passes += bool(plan.chunks)  # one without only tells what to drop
            self._in_flight += 1

    def _admit(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        sink: Sink,
        tenant: str,
        priority: int,
        arrival_s: float,
        deadline_s: float | None,
    ) -> None:
        ticket = _Ticket(request_id=request_id, sink=sink)
        try:
            if request_id in self._tickets:
                raise InvalidRequestError(f"a request with id {request_id} is running already")
            for index in range(params.n):
                seq_id = next(self._ids)
                seed = params.seed if params.seed is not None else self._fresh_seed(seq_id)
                request = Request(
                    seq_id=seq_id,
                    request_id=request_id,
                    prompt_token_ids=prompt,
                    sampling=params,
                    seed=seed + index,
                    tenant=tenant,
                    priority=priority,
                    arrival_s=arrival_s,
                    deadline=None if deadline_s is None else arrival_s + deadline_s,
                    end_token_ids=self._end_ids(params),
                )
                output = SequenceOutput(
                    index=index,
                    params=params,
                    tokenizer=self.tokenizer,
                    prompt_len=len(prompt),
                    max_model_len=self.max_model_len,
                    end_token_ids=self.end_token_ids,
                )
                self._scheduler.add(request)
                ticket.choices[seq_id] = _Choice(
                    request=request,
                    output=output,
                    index=index,
                    prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
                )
        except GiantserveError as error:
            for seq_id in ticket.choices:
                self._scheduler.abort(seq_id)
            sink(error)
            return
        self._tickets[request_id] = ticket
        self._by_sequence.update(dict.fromkeys(ticket.choices, ticket))
        self.counters.requests += 1

    def _fresh_seed(self, seq_id: int) -> int:
        return self.config.seed * 1_000_003 + seq_id * 7919 + time.time_ns() % 1_000_000_007

    def _end_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that would end the sequence, and are barred until ``min_tokens``."""
        model = () if params.ignore_eos else self.end_token_ids
        return tuple({*model, *params.stop_token_ids})

    def _abort(self, request_id: str) -> None:
        ticket = self._tickets.pop(request_id, None)
        if ticket is None:
            return
        for seq_id in ticket.choices:
            self._by_sequence.pop(seq_id, None)
            self._scheduler.abort(seq_id)
        self.counters.aborted += 1

    def _take(self, result: StepResult) -> None:
        sampled = {token.seq_id: token.token_id for token in result.tokens}
        plan = self._scheduler.on_result(result.step_id, sampled, result.lost)
        starts = {chunk.seq_id: chunk.start for chunk in reversed(plan.chunks)}
        for seq_id, logprobs in result.prompt_logprobs.items():
            ticket = self._by_sequence.get(seq_id)
            if ticket is not None:
                known = ticket.choices[seq_id].prompt_logprobs
                assert known is not None
                # a prompt that was preempted half-way comes by again
                known[starts[seq_id] + 1 :] = logprobs
        for token in result.tokens:
            ticket = self._by_sequence.get(token.seq_id)
            if ticket is None:
                continue  # aborted while the pass ran
            choice = ticket.choices[token.seq_id]
            if not self._scheduler.took(token.seq_id, choice.output.num_tokens):
                continue  # computed from KV that was lost
            first = choice.output.num_tokens == 0
            increment = choice.output.append(token.token_id, token.logprobs)
            ticket.completion_tokens += 1
            self.counters.tokens += 1
            usage = None
            if increment.finish_reason is not None:
                self._scheduler.finish(token.seq_id)
                usage = self._retire(ticket, choice)
            ticket.sink(
                StreamDelta(
                    request_id=ticket.request_id,
                    index=choice.index,
                    text=increment.text,
                    token_ids=increment.token_ids,
                    logprobs=increment.logprobs,
                    prompt_logprobs=tuple(choice.prompt_logprobs)
                    if first and choice.prompt_logprobs is not None
                    else None,
                    finish_reason=increment.finish_reason,
                    stop_reason=increment.stop_reason,
                    usage=usage,
                )
            )

    def _retire(self, ticket: _Ticket, choice: _Choice) -> Usage | None:
        """Forget a finished choice; the usage of the whole request with the last one."""
        seq_id = choice.request.seq_id
        del self._by_sequence[seq_id], ticket.choices[seq_id]
        if ticket.choices:
            return None
        del self._tickets[ticket.request_id]
        return Usage(
            prompt_tokens=len(choice.request.prompt_token_ids),
            completion_tokens=ticket.completion_tokens,
            cached_tokens=choice.request.num_cached_tokens,
        )

    def _fail_lost(self) -> None:
        for request in self._scheduler.given_up():
            ticket = self._tickets.get(request.request_id)
            if ticket is not None:
                self._abort(ticket.request_id)
                ticket.sink(
                    KVLostError(
                        f"the KV of the request was lost {request.num_losses} times; check the "
                        "disk under nvme_dir, or keep KV off it"
                    )
                )

    def _fail_expired(self) -> None:
        for request in self._scheduler.expired():
            ticket = self._tickets.get(request.request_id)
            if ticket is not None:
                self._abort(ticket.request_id)
                ticket.sink(EngineDeadError("the request's deadline passed while it waited"))

    def _collect(self, answer: queue.SimpleQueue[dict[str, Any] | GiantserveError]) -> None:
        self._asking.append(answer)
        if self._failure is None:
            self._executor.request_stats()

    def _answer_stats(self) -> None:
        shards = self._executor.stats
        if not self._asking or shards is None:
            return
        values = self.counters.snapshot(self._scheduler, self._pool, shards)
        for answer in self._asking:
            answer.put(values)
        self._asking.clear()

    def _end(self, error: GiantserveError) -> None:
        """Nothing more will run: tell everyone who waits."""
        with self._ending:
            self._failure = error
        self._drain_inbox()
        for ticket in self._tickets.values():
            ticket.sink(EngineDeadError(str(error)))
        for answer in self._asking:
            answer.put(EngineDeadError(str(error)))
        self._tickets.clear()
        self._by_sequence.clear()
        self._flush()
        self._executor.close()
