"""The executor: runs the engine's passes on all shards of a replica, in order."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, Listener, wait
from typing import Any

from giantserve.errors import EngineDeadError
from giantserve.executor.messages import (
    Failure,
    Hello,
    Keep,
    Kept,
    Loaded,
    LoadProgress,
    PassDone,
    Ready,
    Rendezvous,
    Setup,
    Spans,
    Stats,
    StatsRequest,
    Stop,
)
from giantserve.executor.worker_socket import set_options
from giantserve.shard_spec import ShardSpec
from giantserve.step import StepPlan, StepResult
from kvcache.block_copy import BlockCopy
from kvcache.tier import Tier

CONNECT_TIMEOUT_S, CONNECT_CHECK_PERIOD_S = 120.0, 0.5
KEEP_TIMEOUT_S = 60.0
SPANS_TIMEOUT_S = 60.0
ProgressCallback = Callable[[int, LoadProgress], None]


class Executor(ABC):
    """Owns the workers of one replica and the connections to them.

    Subclasses say how workers are started, watched and ended; everything else is the same
    everywhere. `submit` and `results` are for one thread; `wake` may be called from any.
    """

    def __init__(self, specs: list[ShardSpec], host: str, on_progress: ProgressCallback) -> None:
        self._connections: dict[int, Connection[Any, Any]] = {}
        self._on_progress = on_progress
        self._used_bytes: dict[int, dict[Tier, int]] = {}
        self.heard_s = time.monotonic()
        """When a worker last said something."""
        self._stats: dict[int, dict[str, Any]] = {}
        self.known_stats: dict[int, dict[str, Any]] = {}
        """The counters by rank when all shards last told them."""
        self._traces = specs[0].trace
        self.spans: dict[int, list[dict[str, Any]]] = {}
        """By rank what it did when, once the workers have ended."""
        self.kept: dict[int, bytes] = {}
        """The content of the KV blocks that earlier workers left on all shards alike."""
        self._confirms = specs[0].plan.may_lose_blocks
        self._done: dict[int, list[PassDone]] = defaultdict(list)
        self._arrived: list[StepResult] = []
        self._wake_read, self._wake_write = os.pipe()
        self._closed = False
        self._broken = False
        self._closing = threading.Lock()
        self._authkey = secrets.token_bytes(32)
        with Listener((host, 0), backlog=len(specs), authkey=self._authkey) as listener:
            address: tuple[str, int] = listener.address
            try:
                self._start_workers(address, self._authkey, len(specs))
                self._accept(listener, len(specs))
                self._set_up(specs)
            except BaseException:
                self.close()
                raise

    @abstractmethod
    def _start_workers(self, address: tuple[str, int], authkey: bytes, count: int) -> None:
        """Start ranks 0 to count - 1; each connects to ``address``."""

    @abstractmethod
    def _worker_host(self, rank: int) -> str:
        """The address at which other workers reach this one."""

    @abstractmethod
    def _has_ended(self, rank: int) -> bool:
        """Whether a worker that was started is gone. Does not wait."""

    @abstractmethod
    def _why_gone(self, rank: int) -> str:
        """What is known of how a worker ended."""

    @abstractmethod
    def _end_workers(self) -> None:
        """End the workers that are left, by force if need be. Idempotent.

        Once one is gone (``_broken``) the others may wait for it for ever and get no time to end.
        """

    def _accept(self, listener: Listener, count: int) -> None:
        accepting: socket.socket = listener._listener._socket  # type: ignore[attr-defined]
        accepting.settimeout(CONNECT_CHECK_PERIOD_S)
        give_up_s = time.monotonic() + CONNECT_TIMEOUT_S
        while missing := sorted(set(range(count)) - set(self._connections)):
            with contextlib.suppress(TimeoutError, EOFError, ConnectionError):
                connection = listener.accept()
                set_options(connection)
                hello: Hello = connection.recv()
                self._connections[hello.rank] = connection
                continue
            for rank in missing:
                if self._has_ended(rank):
                    self._broken = True
                    raise self._death(rank)
            if time.monotonic() > give_up_s:
                raise EngineDeadError(
                    f"workers {missing} did not start within {CONNECT_TIMEOUT_S:.0f} s"
                )

    def _set_up(self, specs: list[ShardSpec]) -> None:
        hosts = [self._worker_host(spec.rank) for spec in specs]
        rendezvous = None
        self._connections[0].send(Setup(spec=specs[0], host=hosts[0]))
        if len(specs) > 1:
            rendezvous = self._receive(0)
            assert isinstance(rendezvous, Rendezvous)
        for spec in specs[1:]:
            self._connections[spec.rank].send(
                Setup(spec=spec, host=hosts[spec.rank], rendezvous=rendezvous)
            )
        kept = {}
        starting = set(self._connections)
        while starting:
            for rank in self._readable(starting, None):
                message = self._receive(rank)
                if isinstance(message, Ready):
                    starting.discard(rank)
                    kept[rank] = message.kept
                elif isinstance(message, LoadProgress):
                    self._on_progress(rank, message)
        self.kept = {
            block: found
            for block, found in kept[0].items()
            if all(each.get(block) == found for each in kept.values())
        }

    def _readable(self, ranks: set[int], timeout_s: float | None) -> list[int]:
        by_connection = {self._connections[rank]: rank for rank in ranks}
        ready = wait([*by_connection, self._wake_read], timeout_s)
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        return [by_connection[c] for c in ready if c in by_connection]

    def _receive(self, rank: int) -> Any:
        """The next message of a worker; raises the worker's own error, or EngineDeadError."""
        try:
            message = self._connections[rank].recv()
        except (EOFError, OSError):
            self._broken = True
            raise self._death(rank) from None
        if isinstance(message, Failure):
            self._broken = True
            message.error.add_note(message.trace)
            raise message.error
        return message

    def _death(self, rank: int) -> EngineDeadError:
        return EngineDeadError(f"shard {rank} died: {self._why_gone(rank)}")

    def submit(self, plan: StepPlan) -> None:
        """Hand a pass to all shards at once. Raises EngineDeadError where one is gone."""
        self._tell_all(plan)

    def _tell_all(self, message: Any) -> None:
        """Raises what a shard failed with, or EngineDeadError where one is gone."""
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        for rank, connection in self._connections.items():
            try:
                connection.send_bytes(payload)
            except OSError:
                while True:  # a worker that failed said why before it left
                    self._receive(rank)

    def results(self, timeout_s: float | None) -> list[StepResult]:
        """Results that have arrived; waits up to ``timeout_s`` for the first, or until woken.

        Where blocks can be lost, a result has arrived when every shard has said what it lost.
        Raises what a shard failed with, or EngineDeadError where one is gone.
        """
        for rank in self._readable(set(self._connections), timeout_s):
            self.heard_s = time.monotonic()
            while True:
                message = self._receive(rank)
                if isinstance(message, StepResult):
                    self._arrived.append(message)
                elif isinstance(message, PassDone):
                    self._done[message.step_id].append(message)
                elif isinstance(message, Stats):
                    self._take_stats(rank, message)
                elif isinstance(message, LoadProgress):
                    self._on_progress(rank, message)
                elif isinstance(message, Loaded):
                    self._used_bytes[rank] = message.used_bytes
                if not self._connections[rank].poll():
                    break
        results, self._arrived = self._arrived, []
        return self._confirmed(results) if self._confirms else results

    def _take_stats(self, rank: int, message: Stats) -> None:
        self._stats[rank] = message.values
        if len(self._stats) == len(self._connections):
            self.known_stats = dict(self._stats)

    @property
    def used_bytes(self) -> dict[Tier, int] | None:
        """What the shards hold on each tier, together, once all are loaded."""
        if len(self._used_bytes) < len(self._connections):
            return None
        return {tier: sum(used[tier] for used in self._used_bytes.values()) for tier in Tier}

    def _confirmed(self, results: list[StepResult]) -> list[StepResult]:
        """Those that all shards have confirmed, with what they lost; the others arrive later."""
        confirmed = []
        for result in results:
            if len(self._done[result.step_id]) < len(self._connections):
                self._arrived.append(result)
                continue
            lost = {block for done in self._done.pop(result.step_id) for block in done.lost}
            confirmed.append(replace(result, lost=tuple(lost)))
        return confirmed

    def wake(self) -> None:
        """Make a waiting `results` return. From any thread."""
        with self._closing:
            if not self._closed:
                os.write(self._wake_write, b"x")

    def request_stats(self) -> None:
        """Ask all shards for their counters; they arrive with later results. Raises what a shard
        failed with, or EngineDeadError where one is gone."""
        self._stats.clear()
        self._tell_all(StatsRequest())

    @property
    def stats(self) -> dict[int, dict[str, Any]] | None:
        """The counters by rank, once all shards have answered."""
        return self._stats if len(self._stats) == len(self._connections) else None

    def keep(self, copies: tuple[BlockCopy, ...], hashes: dict[int, bytes]) -> None:
        """Have all shards leave these KV blocks to later workers; waits until they have.

        Raises what a shard failed with, or EngineDeadError where one is gone, or says nothing for
        `KEEP_TIMEOUT_S`.
        """
        self._tell_all(Keep(copies=copies, hashes=hashes))
        for rank, connection in self._connections.items():
            kept = False
            while not kept:
                if not connection.poll(KEEP_TIMEOUT_S):
                    self._broken = True
                    raise EngineDeadError(
                        f"shard {rank} did not get on with keeping KV for {KEEP_TIMEOUT_S:.0f} s"
                    )
                kept = isinstance(self._receive(rank), Kept)

    def _collect_spans(self) -> None:
        """What the workers send before they go, within `SPANS_TIMEOUT_S`; nothing of one that is
        gone."""
        give_up_s = time.monotonic() + SPANS_TIMEOUT_S
        for rank, connection in self._connections.items():
            with contextlib.suppress(EOFError, OSError):
                while connection.poll(max(0.0, give_up_s - time.monotonic())):
                    message = connection.recv()
                    if isinstance(message, Spans):
                        self.spans[rank] = message.spans
                        break

    def close(self) -> None:
        """Stop the workers and release everything. Idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for connection in self._connections.values():
            try:
                connection.send(Stop())
            except OSError:
                continue  # it is gone already
        if self._traces and not self._broken:
            self._collect_spans()
        try:
            self._end_workers()
        finally:
            for connection in self._connections.values():
                connection.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
