"""Repeats something until it is known what it takes on a machine that does nothing else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

TIME_LIMIT_S = 0.15
LEAST_SAMPLES = 3


def seconds_of(action: Callable[[], Any], device: str, time_limit_s: float = TIME_LIMIT_S) -> float:
    """Seconds of one ``action``: the lower quartile of what fits the time limit, after one to warm
    up. What others do on the machine only ever adds to it."""

    def once() -> float:
        start = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    samples: list[float] = []
    deadline = time.perf_counter() + time_limit_s
    while len(samples) < LEAST_SAMPLES or time.perf_counter() < deadline:
        samples.append(once())
    return statistics.quantiles(samples, n=4)[0]
