"""Where to cut the layers: exact dynamic programming over [first, end) tables of stage times."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Split = tuple[tuple[int, int], ...]


def split_layers(stage_times: list[NDArray[np.float64]]) -> Split | None:
    """Cut layers into one run per table so that the slowest stage is fastest; None: no finite cut.

    ``stage_times[s][first, end]`` is stage s's time for that run (inf: impossible). Among the cuts
    with the least slowest stage, the one with the least sum of squares, so that the others are
    balanced. The min-max recurrence is that of PipeDream (Narayanan et al., 2019), O(stages
    layers^2).
    """
    num_layers = stage_times[0].shape[0] - 1
    best = stage_times[0][0]
    for times in stage_times[1:]:
        best = np.min(np.maximum(best[:, None], times), axis=0)
    slowest = best[num_layers]
    if not np.isfinite(slowest):
        return None
    squares = [np.where(times <= slowest, times * times, np.inf) for times in stage_times]
    total = squares[0][0]
    cuts: list[NDArray[np.int64]] = []
    for square in squares[1:]:
        sums = total[:, None] + square
        cuts.append(np.argmin(sums, axis=0))
        total = np.min(sums, axis=0)
    end = num_layers
    runs: list[tuple[int, int]] = []
    for cut in reversed(cuts):
        first = int(cut[end])
        runs.append((first, end))
        end = first
    return ((0, end), *reversed(runs))
