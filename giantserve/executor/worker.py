"""A worker: one process that runs one shard and obeys the engine over one connection."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Client
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from giantserve.errors import EngineDeadError, GiantserveError
from giantserve.executor.messages import (
    Failure,
    Heartbeat,
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
from giantserve.models.collectives import StageLink, TensorParallel
from giantserve.models.shared_memory import SharedMemoryGroup
from giantserve.shard import Shard
from giantserve.step import StepPlan
from partition.plan import PartitionPlan

PROGRESS_INTERVAL_S = 0.1
HEARTBEAT_PERIOD_S = 5.0
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class EngineConnection:
    """The engine, as a worker sees it: any thread may tell it something, one asks what it wants.

    A thread reads what it sends at once: the engine, which sends a pass while another runs, would
    else wait for the worker, and the worker with a large result for the engine.
    """

    def __init__(self, address: tuple[str, int], authkey: bytes, rank: int) -> None:
        self._connection = Client(address, authkey=authkey)
        set_options(self._connection)
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.rank = rank
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)

    def receive(self) -> Any:
        """The next message; EOFError where the engine is gone."""
        message = self._inbox.get()
        if isinstance(message, Exception):
            self._inbox.put(message)
            raise message
        return message

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except Exception as error:
            self._inbox.put(error)

    def report(self, error: Exception) -> None:
        """Say what the worker failed with, if the engine is still there."""
        trace = traceback.format_exc()
        if not isinstance(error, GiantserveError | ValueError | OSError):
            error = EngineDeadError(f"shard {self.rank} failed: {type(error).__name__}: {error}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = EngineDeadError(f"shard {self.rank} failed: {type(error).__name__}: {error}")
        with contextlib.suppress(OSError, EOFError):
            self.send(Failure(rank=self.rank, error=error, trace=trace))

    def close(self) -> None:
        self._connection.close()


def run_worker(address: tuple[str, int], authkey: bytes, rank: int) -> None:
    """Connect to the engine at ``address`` and serve it until it says stop or goes away."""
    engine = EngineConnection(address, authkey, rank)
    engine.send(Hello(rank=rank, pid=os.getpid()))
    shard = None
    ended = threading.Event()
    try:
        setup: Setup = engine.receive()
        torch.set_num_threads(setup.spec.num_threads)
        shard = _become(setup, engine)
        engine.send(Ready(kept=shard.kept))
        threading.Thread(target=_watch, args=(shard, engine, ended), daemon=True).start()
        _serve(shard, engine)
    except (EOFError, ConnectionError):
        pass  # the engine is gone, and with it the reason to live
    except Exception as error:
        engine.report(error)
    finally:
        ended.set()
        if shard is not None:
            shard.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        engine.close()


def _watch(shard: Shard, engine: EngineConnection, ended: threading.Event) -> None:
    """Tell the engine how the load ended, and that what it asked for gets on, however long that
    takes."""
    try:
        shard.wait_until_loaded()
        engine.send(Loaded(used_bytes=shard.used_bytes()))
        last = shard.progress
        while not ended.wait(HEARTBEAT_PERIOD_S):
            if (now := shard.progress) != last:
                engine.send(Heartbeat())
                last = now
    except Exception as error:
        if not ended.is_set():
            engine.report(error)


def _become(setup: Setup, engine: EngineConnection) -> Shard:
    spec = setup.spec
    tensor_parallel, link = _join(setup, engine)
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > PROGRESS_INTERVAL_S:
            last = now
            engine.send(LoadProgress(what=what, done_bytes=done, total_bytes=total))

    return Shard(spec, tensor_parallel, link, progress)


def _join(setup: Setup, engine: EngineConnection) -> tuple[TensorParallel, StageLink]:
    """Meet the other ranks; every rank builds every group, in the same order."""
    plan, rank = setup.spec.plan, setup.spec.rank
    world = len(plan.shards)
    if world == 1:
        return TensorParallel(), StageLink(None, None)
    is_master = rank == 0
    meeting = setup.rendezvous
    store = TCPStore(
        setup.host if meeting is None else meeting.host,
        0 if meeting is None else meeting.port,
        world,
        is_master=is_master,
        wait_for_workers=False,
        timeout=COLLECTIVE_TIMEOUT,
    )
    if is_master:
        engine.send(Rendezvous(host=setup.host, port=store.port))
    backend = "nccl" if setup.spec.device.startswith("cuda") else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
    )
    return _tensor_parallel(plan, rank, backend), _link(plan, rank)


def _tensor_parallel(plan: PartitionPlan, rank: int, backend: str) -> TensorParallel:
    own = TensorParallel()
    if plan.tensor_parallel == 1:
        return own
    for stage in plan.stages:
        ranks = [shard.rank for shard in stage.shards]
        group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
        if rank in ranks:
            place = ranks.index(rank)
            shared = SharedMemoryGroup.join(place, group, ranks) if backend == "gloo" else None
            own = TensorParallel(rank=place, world=len(ranks), group=group, shared=shared)
    return own


def _link(plan: PartitionPlan, rank: int) -> StageLink:
    width = plan.tensor_parallel
    previous, following = rank - width, rank + width
    return StageLink(
        previous if previous >= 0 else None,
        following if following < len(plan.shards) else None,
    )


def _serve(shard: Shard, engine: EngineConnection) -> None:
    while True:
        message = engine.receive()
        if isinstance(message, StepPlan):
            result = shard.run(message)
            if shard.may_lose_blocks:
                engine.send(PassDone(step_id=message.step_id, lost=shard.take_lost()))
            if result is not None:
                engine.send(result)
        elif isinstance(message, StatsRequest):
            engine.send(Stats(rank=engine.rank, values=shard.stats()))
        elif isinstance(message, Keep):
            shard.keep(message.copies, message.hashes)
            engine.send(Kept())
        elif isinstance(message, Stop):
            if shard.keeps_trace:
                engine.send(Spans(spans=shard.spans()))
            return
        else:
            raise AssertionError(f"unexpected message {message!r}")
