"""What two shards take to send to each other and to sum over both.

python -m giantserve.probes.link DEVICE RANK HOST PORT    (started by `probe_end`; rank 0 runs on
HOST and prints one JSON object)
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from giantserve.errors import ConfigError
from giantserve.free_ports import free_port
from giantserve.models.collectives import TensorParallel
from giantserve.models.shared_memory import SharedMemoryGroup
from giantserve.probes.timing import seconds_of
from partition.links import Link

SMALL_BYTES, LARGE_BYTES = 4 << 10, 1 << 20
LEAST_SHARE = 0.02
"""Of the large message's time, what its bytes take at least."""
REPEATS = 20
MEETING_TIMEOUT_S, TIMEOUT_S = 60.0, 120.0


class _Seconds(NamedTuple):
    """Of a small and of a large message."""

    small: float
    large: float

    def latency_and_bandwidth(self, moved: float = 1.0) -> tuple[float, float]:
        """Fit latency + ``moved`` x bytes / bandwidth (Hockney, 1994). On a busy machine the small
        message may take longer than the large one, whose bytes then still take their share."""
        transfer = max(self.large - self.small, self.large * LEAST_SHARE)
        slope = transfer / (LARGE_BYTES - SMALL_BYTES)
        return max(0.0, self.small - slope * SMALL_BYTES), moved / slope


def probe_link(device: str) -> Link:
    """Between two shards of this machine, in about 3 s, most of it the start of two processes.

    Where there is but one GPU there is nothing between GPUs; what two processes reach is told.
    """
    several = device.startswith("cuda") and torch.cuda.device_count() > 1
    devices = ("cuda:0", "cuda:1") if several else ("cpu", "cpu")
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        first, _ = threads.map(
            lambda rank: probe_end(devices[rank], rank, "127.0.0.1", port), (0, 1)
        )
    assert first is not None
    return first


def probe_end(device: str, rank: int, host: str, port: int) -> Link | None:
    """One of the two ends, which meet at ``port`` of rank 0's ``host``; rank 0 is told the link.

    Raises ConfigError where they cannot reach each other.
    """
    command = [sys.executable, "-m", "giantserve.probes.link", device, str(rank), host, str(port)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"rank {rank} of a link waited {TIMEOUT_S:.0f} s at {host}:{port}; check that the "
            "two machines reach each other on every port"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError(f"two processes cannot reach each other at {host}:{port}: {reason}")
    if rank:
        return None
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


def _measure(device: str, rank: int, host: str, port: int) -> dict[str, _Seconds]:
    on_cuda = device.startswith("cuda")
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=MEETING_TIMEOUT_S)
    store = TCPStore(host, port, 2, is_master=rank == 0, wait_for_workers=False, timeout=wait)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=2, timeout=wait
    )
    place = torch.device(device)
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


def _main(device: str, rank: str, host: str, port: str) -> None:
    print(json.dumps(_measure(device, int(rank), host, int(port))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
