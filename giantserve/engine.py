"""The engine: one thread that schedules passes, runs them on the shards and hands out tokens."""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    OverflowedError,
)
from giantserve.executor.base import Executor
from giantserve.executor.launcher import Launcher, run_beside
from giantserve.executor.messages import LoadProgress
from giantserve.executor.select import make_executor
from giantserve.open_requests import OpenRequests, Sink, Submission
from giantserve.planning import Resolution, resolve
from giantserve.sampling_params import SamplingParams
from giantserve.scheduler import Scheduler, SchedulerConfig
from giantserve.step import StepResult
from giantserve.tier_check import check_asked, check_held
from giantserve.tokenizer import Tokenizer, load_tokenizer
from giantserve.trace_file import write_trace
from kvcache.block_pool import BlockPool
from kvcache.eviction import NextRequests
from kvcache.tier import Tier
from partition.byte_size import format_bytes
from partition.plan import PartitionPlan

logger = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 60.0
BUSY_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 60.0


def _run_all(actions: Sequence[Callable[[], None]]) -> None:
    for action in actions:
        action()


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
    """Runs one replica; `close` ends it.

    Construction returns when the shards take passes. What of their weights stays in memory may
    still be on its way there: passes wait for it, `wait_until_loaded` for all of it.
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
        if plan is None:
            check_asked(config, self.plan)
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
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._held = threading.local()
        self._open = OpenRequests(
            tokenizer=self.tokenizer,
            end_token_ids=self.end_token_ids,
            max_model_len=self.max_model_len,
            seed=secrets.randbits(31) if config.seed is None else config.seed,
        )
        self._in_flight = 0
        self._flush = flush
        self._failure: GiantserveError | None = None
        self._cause: Exception | None = None
        self._loaded = threading.Event()
        self._busy_since_s = time.monotonic()
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

    def wait_until_loaded(self) -> None:
        """Until all weights are on their tiers. Raises what the load failed with,
        EngineDeadError where a tier of the plan holds nothing."""
        self._loaded.wait()
        if self._cause is not None:
            raise self._cause

    @property
    def is_loaded(self) -> bool:
        """Whether `wait_until_loaded` returns at once."""
        return self._loaded.is_set()

    @property
    def stalled_s(self) -> float:
        """For how long no shard has got on with the passes under way; 0 where there are none."""
        if not self._in_flight:
            return 0.0
        return time.monotonic() - max(self._busy_since_s, self._executor.heard_s)

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
        given = Submission(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            sink=sink,
            tenant=tenant,
            priority=priority,
            arrival_s=time.monotonic(),
            deadline_s=deadline_s,
        )
        self._enqueue(lambda: self._admit(given))

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
        shard; of the shards as they last told, where a pass keeps them longer than
        `BUSY_TIMEOUT_S`."""
        if self._failure is not None:
            raise EngineDeadError(str(self._failure))
        answer: queue.SimpleQueue[dict[str, Any] | GiantserveError] = queue.SimpleQueue()
        self._enqueue(lambda: self._collect(answer))
        try:
            values = answer.get(timeout=min(timeout_s, BUSY_TIMEOUT_S))
        except queue.Empty:
            self._enqueue(lambda: self._answer_if_busy(answer))
            try:
                values = answer.get(timeout=timeout_s)
            except queue.Empty:
                why = f"the engine did not answer within {timeout_s:.0f} s"
                raise EngineDeadError(why) from None
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
                self._note_load()
                self._fail_expired()
                self._fail_lost()
                self._answer_stats()
            self._keep_prefixes()
            self._end(EngineDeadError("the engine was closed"))
        except GiantserveError as error:
            self._end(error)
        except Exception as error:
            logger.exception("the engine failed")
            what = f"the engine failed: {type(error).__name__}: {error}"
            self._end(EngineDeadError(what), cause=error)

    def _note_load(self) -> None:
        used = self._executor.used_bytes
        if used is None or self._loaded.is_set():
            return
        check_held(self.plan, used)
        held = ", ".join(f"{tier.value} {format_bytes(used[tier])}" for tier in Tier)
        logger.info("loaded: %s", held)
        self._loaded.set()

    def _keep_prefixes(self) -> None:
        """Leave cached KV to a later engine, if the config says so."""
        if self.config.prefix_memory is None:
            return
        begun_s = time.monotonic()
        while self._in_flight:
            for result in self._executor.results(BUSY_TIMEOUT_S):
                self._in_flight -= 1
                self._take(result)
            if time.monotonic() - max(begun_s, self._executor.heard_s) > CLOSE_TIMEOUT_S:
                raise EngineDeadError(f"no shard got on within {CLOSE_TIMEOUT_S:.0f} s")
        for seq_id in self._open:
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
            if not self._in_flight:
                self._busy_since_s = time.monotonic()
            self.counters.passes += bool(plan.chunks)  # one without only tells what to drop
            self._in_flight += 1

    def _admit(self, given: Submission) -> None:
        try:
            requests = self._open.open(given)
        except GiantserveError as error:
            given.sink(error)
            return
        try:
            for request in requests:
                self._scheduler.add(request)
        except GiantserveError as error:
            self._drop(given.request_id)
            given.sink(error)
            return
        self.counters.requests += 1

    def _drop(self, request_id: str) -> bool:
        """Give a request up and free its blocks; whether it was open."""
        sequences = self._open.forget(request_id)
        for seq_id in sequences:
            self._scheduler.abort(seq_id)
        return bool(sequences)

    def _abort(self, request_id: str) -> None:
        self.counters.aborted += self._drop(request_id)

    def _take(self, result: StepResult) -> None:
        sampled = {token.seq_id: token.token_id for token in result.tokens}
        plan = self._scheduler.on_result(result.step_id, sampled, result.lost)
        starts = {chunk.seq_id: chunk.start for chunk in reversed(plan.chunks)}
        for seq_id, logprobs in result.prompt_logprobs.items():
            self._open.take_prompt_logprobs(seq_id, starts[seq_id], logprobs)
        for token in result.tokens:
            num_tokens = self._open.num_tokens(token.seq_id)
            if num_tokens is None:
                continue  # aborted while the pass ran
            if not self._scheduler.took(token.seq_id, num_tokens):
                continue  # computed from KV that was lost
            if token.overflowed:
                self._scheduler.distrust(token.seq_id)  # a codec makes numbers of what are none
                self._fail(self._open.request_id(token.seq_id), self._overflow())
                continue
            self.counters.tokens += 1
            sink, delta = self._open.take(token)
            if delta.finish_reason is not None:
                self._scheduler.finish(token.seq_id)
            sink(delta)

    def _overflow(self) -> OverflowedError:
        return OverflowedError(
            f"the model's logits are not finite: its activations overflow {self.plan.dtype}; load "
            'it with another dtype ("bfloat16", "float32")'
        )

    def _fail_lost(self) -> None:
        for request in self._scheduler.given_up():
            why = (
                f"the KV of the request was lost {request.num_losses} times; check the disk under "
                "nvme_dir, or keep KV off it"
            )
            self._fail(request.request_id, KVLostError(why))

    def _fail_expired(self) -> None:
        for request in self._scheduler.expired():
            why = "the request's deadline passed while it waited"
            self._fail(request.request_id, EngineDeadError(why))

    def _fail(self, request_id: str, error: GiantserveError) -> None:
        sink = self._open.sink(request_id)
        if sink is not None:
            self._abort(request_id)
            sink(error)

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

    def _answer_if_busy(self, answer: queue.SimpleQueue[dict[str, Any] | GiantserveError]) -> None:
        """Where the shards come to it only after the passes under way, with what they last told."""
        if self._in_flight:
            shards = self._executor.known_stats
            answer.put(self.counters.snapshot(self._scheduler, self._pool, shards))

    def _end(self, error: GiantserveError, cause: Exception | None = None) -> None:
        """Nothing more will run: tell everyone who waits."""
        with self._ending:
            self._failure = error
        if not self._loaded.is_set():
            self._cause = cause or error
            self._loaded.set()
        self._drain_inbox()
        self._open.fail_all(EngineDeadError(str(error)))
        for answer in self._asking:
            answer.put(EngineDeadError(str(error)))
        self._flush()
        self._executor.close()
