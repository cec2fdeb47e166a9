"""A worker: one process that runs one shard and obeys the engine over one connection."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from giantserve.errors import EngineDeadError, GiantserveError
from giantserve.executor.messages import (
    Failure,
    Hello,
    Keep,
    Kept,
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
from giantserve.executor.worker_socket import set_no_delay
from giantserve.models.collectives import StageLink, TensorParallel
from giantserve.models.shared_memory import SharedMemoryGroup
from giantserve.shard import Shard
from giantserve.step import StepPlan
from partition.plan import PartitionPlan

PROGRESS_INTERVAL_S = 0.1
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def run_worker(address: tuple[str, int], authkey: bytes, rank: int) -> None:
    """Connect to the engine at ``address`` and serve it until it says stop or goes away."""
    connection = Client(address, authkey=authkey)
    set_no_delay(connection)
    connection.send(Hello(rank=rank, pid=os.getpid()))
    shard = None
    try:
        setup: Setup = connection.recv()
        torch.set_num_threads(setup.spec.num_threads)
        shard = _become(setup, connection)
        connection.send(Ready(kept=shard.kept))
        _serve(shard, connection, rank)
    except (EOFError, ConnectionError):
        pass  # the engine is gone, and with it the reason to live
    except Exception as error:
        _report(connection, rank, error)
    finally:
        if shard is not None:
            shard.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.close()


def _report(connection: Connection[Any, Any], rank: int, error: Exception) -> None:
    trace = traceback.format_exc()
    if not isinstance(error, GiantserveError | ValueError | OSError):
        error = EngineDeadError(f"shard {rank} failed: {type(error).__name__}: {error}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = EngineDeadError(f"shard {rank} failed: {type(error).__name__}: {error}")
    try:
        connection.send(Failure(rank=rank, error=error, trace=trace))
    except (OSError, EOFError):
        return


def _become(setup: Setup, connection: Connection[Any, Any]) -> Shard:
    spec = setup.spec
    tensor_parallel, link = _join(setup, connection)
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > PROGRESS_INTERVAL_S:
            last = now
            connection.send(LoadProgress(what=what, done_bytes=done, total_bytes=total))

    return Shard(spec, tensor_parallel, link, progress)


def _join(setup: Setup, connection: Connection[Any, Any]) -> tuple[TensorParallel, StageLink]:
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
        connection.send(Rendezvous(host=setup.host, port=store.port))
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


def _serve(shard: Shard, connection: Connection[Any, Any], rank: int) -> None:
    while True:
        message = connection.recv()
        if isinstance(message, StepPlan):
            result = shard.run(message)
            if shard.may_lose_blocks:
                connection.send(PassDone(step_id=message.step_id, lost=shard.take_lost()))
            if result is not None:
                connection.send(result)
        elif isinstance(message, StatsRequest):
            connection.send(Stats(rank=rank, values=shard.stats()))
        elif isinstance(message, Keep):
            shard.keep(message.copies, message.hashes)
            connection.send(Kept())
        elif isinstance(message, Stop):
            if shard.keeps_trace:
                connection.send(Spans(spans=shard.spans()))
            return
        else:
            raise AssertionError(f"unexpected message {message!r}")
