"""Workers as Ray actors.

Ray places, starts and watches them; passes go over the workers' own connections.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from giantserve.errors import EngineDeadError
from giantserve.executor.base import Executor, ProgressCallback
from giantserve.executor.launcher import node_launcher
from giantserve.shard_spec import ShardSpec

PLACEMENT_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
OBJECT_STORE_BYTES = 128 << 20


class ShardActor:
    """Hosts one worker: a fork of the machine's launcher where there is one, else this process.

    `run` lasts as long as the worker does, and a worker no longer than its actor.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    def node_ip(self) -> str:
        return _node_ip()

    def pid(self) -> int:
        return self._pid

    def run(self, address: tuple[str, int], authkey: bytes, rank: int) -> None:
        launcher = node_launcher()
        if launcher is None:
            from giantserve.executor.worker import run_worker

            run_worker(address, authkey, rank)
            return
        with contextlib.closing(launcher):
            self._pid = launcher.launch(address, authkey, rank)
            _wait_for_end(self._pid)
            status = launcher.exit_status(self._pid)
        if status != "status 0":
            raise EngineDeadError(f"its process ended with {status}")


class RayExecutor(Executor):
    """One actor a shard, which asks for what its bundle holds.

    Inside a Serve replica the actors go to bundles 1, 2, ... of the replica's own placement group;
    elsewhere a group is made, and removed at the end, as is a Ray that had to be started.
    """

    def __init__(self, specs: list[ShardSpec], on_progress: ProgressCallback) -> None:
        self._own_ray = not ray.is_initialized()
        if self._own_ray:
            _start_ray()
        self._gpus = 1 if specs[0].device.startswith("cuda") else 0
        if self._gpus:  # each actor sees the one GPU that Ray gave it
            specs = [_on_only_device(spec) for spec in specs]
        self._own_group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._runs: list[ray.ObjectRef[None]] = []
        self._hosts: list[str] = []
        super().__init__(specs, _node_ip(), on_progress)

    def _start_workers(self, address: tuple[str, int], authkey: bytes, count: int) -> None:
        group, first_bundle = self._placement(count)
        for rank in range(count):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=first_bundle + rank
            )
            bundle = group.bundle_specs[first_bundle + rank]
            remote: Any = ray.remote
            actor_class = remote(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                max_concurrency=2,
                scheduling_strategy=strategy,
            )(ShardActor)
            self._actors.append(actor_class.remote())
        self._hosts = _in_time(
            [actor.node_ip.remote() for actor in self._actors],
            f"the actors of {count} shards did not start",
        )
        self._runs = [
            actor.run.remote(address, authkey, rank) for rank, actor in enumerate(self._actors)
        ]

    def _placement(self, count: int) -> tuple[PlacementGroup, int]:
        current = ray.util.get_current_placement_group()
        if current is not None and current.bundle_count > count:
            return current, 1
        bundle: dict[str, float] = {"CPU": 1.0, "GPU": 1.0} if self._gpus else {"CPU": 0.001}
        self._own_group = placement_group([bundle] * count, strategy="PACK")
        _in_time(self._own_group.ready(), f"Ray found no room for {count} x {bundle}")
        return self._own_group, 0

    @property
    def worker_pids(self) -> list[int]:
        """Process ids by rank."""
        return list(ray.get([actor.pid.remote() for actor in self._actors]))

    def _worker_host(self, rank: int) -> str:
        return self._hosts[rank]

    def _has_ended(self, rank: int) -> bool:
        return bool(ray.wait([self._runs[rank]], timeout=0)[0])

    def _why_gone(self, rank: int) -> str:
        try:
            ray.get(self._runs[rank], timeout=2.0)
        except ray.exceptions.RayActorError as error:
            return str(error).splitlines()[0]
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            known = isinstance(cause, EngineDeadError)
            return str(cause) if known else f"{type(cause).__name__}: {cause}"
        except ray.exceptions.GetTimeoutError as error:
            return type(error).__name__
        return "its connection closed"

    def _end_workers(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(
                self._runs,
                num_returns=len(self._runs),
                timeout=0.0 if self._broken else STOP_TIMEOUT_S,
            )
        for actor in self._actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
        if self._own_group is not None:
            remove_placement_group(self._own_group)
            self._own_group = None
        if self._own_ray:
            self._own_ray = False
            ray.shutdown()


def _start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names; without one, a Ray of this process alone."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _wait_for_end(pid: int) -> None:
    """Until a process that is not a child of this one has ended."""
    process = os.pidfd_open(pid)
    try:
        select.select([process], [], [])
    finally:
        os.close(process)


def _node_ip() -> str:
    get: Any = ray.util.get_node_ip_address
    return str(get())


def _in_time(refs: Any, what: str) -> Any:
    try:
        return ray.get(refs, timeout=PLACEMENT_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        free: Any = ray.available_resources
        raise EngineDeadError(
            f"{what} within {PLACEMENT_TIMEOUT_S:.0f} s; the cluster has {free()} free"
        ) from None


def _on_only_device(spec: ShardSpec) -> ShardSpec:
    from dataclasses import replace

    return replace(spec, device="cuda:0")
