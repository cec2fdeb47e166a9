"""What two shards of this machine take to send to each other and to sum over both.

python -m giantserve.probes.link DEVICE    (started by `probe_link`; prints one JSON object)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist

from giantserve.errors import ConfigError
from giantserve.models.collectives import TensorParallel
from giantserve.models.shared_memory import SharedMemoryGroup
from giantserve.probes.timing import seconds_of
from partition.links import Link

SMALL_BYTES, LARGE_BYTES = 4 << 10, 1 << 20
REPEATS = 20
TIMEOUT_S = 120.0


class _Seconds(NamedTuple):
    """Of a small and of a large message."""

    small: float
    large: float

    def latency_and_bandwidth(self, moved: float = 1.0) -> tuple[float, float]:
        """Fit latency + ``moved`` x bytes / bandwidth (Hockney, 1994)."""
        slope = max(self.large - self.small, 1e-9) / (LARGE_BYTES - SMALL_BYTES)
        return max(0.0, self.small - slope * SMALL_BYTES), moved / slope


def probe_link(device: str) -> Link:
    """Measure in about 3 s, most of it the start of the two processes."""
    command = [sys.executable, "-m", "giantserve.probes.link", device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError(f"two processes of this machine cannot reach each other: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    latency, bandwidth = _Seconds(*found["send"]).latency_and_bandwidth()
    # a ring of two moves 2 (w-1)/w = 1 of the message
    reduce_latency, reduce_bandwidth = _Seconds(*found["all_reduce"]).latency_and_bandwidth()
    return Link(
        bandwidth=bandwidth,
        latency_s=latency,
        all_reduce_bandwidth=reduce_bandwidth,
        all_reduce_latency_s=reduce_latency,
    )


def _measure(rank: int, port: int, device: str) -> dict[str, _Seconds]:
    on_cuda = device.startswith("cuda")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=2)
    place = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    group = dist.group.WORLD
    assert group is not None
    shared = None if on_cuda else SharedMemoryGroup.join(rank, group, [0, 1])
    ranks = TensorParallel(rank=rank, world=2, group=group, shared=shared)

    def exchange(message: torch.Tensor) -> None:
        if rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        else:
            dist.recv(message, 0)
            dist.send(message, 0)

    def seconds(num_bytes: int, *, collective: bool) -> float:
        message = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=place)

        def repeat() -> None:
            for _ in range(REPEATS):
                if collective:
                    ranks.all_reduce(message)
                else:
                    exchange(message)

        # both ranks must repeat equally often: no time limit
        total = seconds_of(repeat, str(place), time_limit_s=0.0)
        return total / REPEATS / (1 if collective else 2)

    def both(collective: bool) -> _Seconds:
        return _Seconds(*(seconds(n, collective=collective) for n in (SMALL_BYTES, LARGE_BYTES)))

    found = {"send": both(False), "all_reduce": both(True)}
    dist.destroy_process_group()
    return found


def _main() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    child = os.fork()  # before any thread pool is started
    rank = 0 if child else 1
    found = _measure(rank, store.port, sys.argv[1])
    if child:
        os.waitpid(child, 0)
        print(json.dumps(found))
    else:
        os._exit(0)


if __name__ == "__main__":
    _main()
