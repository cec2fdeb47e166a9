"""Where to cut the layers: exact dynamic programming over [first, end) tables of stage times."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Split = tuple[tuple[int, int], ...]

CHUNK_ELEMENTS = 1 << 20
"""How many numbers `cut_times` works on at once."""


TIE_BREAK = 1e-9
"""What an even cut is worth against a short sum, as a share of it."""

TINY_S = 1e-12


def split_layers(stage_times: list[NDArray[np.float64]], in_turn: bool = True) -> Split | None:
    """Cut layers into one run per table; None: no finite cut.

    ``stage_times[s][first, end]`` is stage s's time for that run (inf: impossible). Stages that
    work ``in_turn`` on passes of their own are as fast as the slowest, which is made fastest (the
    recurrence of PipeDream, Narayanan et al., 2019). Else one pass goes through all stages, and the
    sum of their times is made least. Among equal cuts the one with the least sum of squares, so
    that the stages are balanced. O(stages layers^2).
    """
    num_layers = stage_times[0].shape[0] - 1
    least = _through(stage_times, in_turn)[num_layers]
    if not np.isfinite(least):
        return None
    if in_turn:
        costs = [np.where(times <= least, times * times, np.inf) for times in stage_times]
    else:
        costs = [times * (1 + TIE_BREAK * times / max(least, TINY_S)) for times in stage_times]
    total = costs[0][0]
    cuts: list[NDArray[np.int64]] = []
    for cost in costs[1:]:
        sums = total[:, None] + cost
        cuts.append(np.argmin(sums, axis=0))
        total = np.min(sums, axis=0)
    end = num_layers
    runs: list[tuple[int, int]] = []
    for cut in reversed(cuts):
        first = int(cut[end])
        runs.append((first, end))
        end = first
    return ((0, end), *reversed(runs))


def cut_time(times: list[float], in_turn: bool) -> float:
    """Seconds between two tokens of a sequence when the stages of a cut take ``times``: passes in
    turn wait for the slowest stage once each (GPipe, Huang et al., 2019), one pass goes through
    all."""
    return len(times) * max(times) if in_turn else sum(times)


def cut_times(
    tables: NDArray[np.float64], sequences: NDArray[np.int64], in_turn: bool
) -> NDArray[np.float64]:
    """`cut_time` of the best cut for every row of ``sequences`` [n, stages], which names the table
    [first, end] of each stage; inf: no finite cut."""
    num_layers = tables.shape[1] - 1
    step = max(1, CHUNK_ELEMENTS // tables[0].size)
    best: list[NDArray[np.float64]] = [np.zeros(0)]
    for start in range(0, len(sequences), step):
        columns = sequences[start : start + step].T
        best.append(_through((tables[column] for column in columns), in_turn)[..., num_layers])
    passes = sequences.shape[1] if in_turn else 1
    return passes * np.concatenate(best)


def chain_times(table: NDArray[np.float64], stages: int, in_turn: bool) -> list[float]:
    """`cut_time` of the best cuts into 1, 2, ... ``stages`` stages that all have ``table``."""
    best = table[0]
    times = [float(best[-1])]
    for count in range(2, stages + 1):
        best = _extend(best, table, in_turn)
        times.append(float(best[-1]) * (count if in_turn else 1))
    return times


def _through(stages: Iterable[NDArray[np.float64]], in_turn: bool) -> NDArray[np.float64]:
    """[..., end]: the best time (of the slowest stage, or of all) in which all stages reach end."""
    tables = iter(stages)
    best = next(tables)[..., 0, :]
    for table in tables:
        best = _extend(best, table, in_turn)
    return best


def _extend(
    best: NDArray[np.float64], table: NDArray[np.float64], in_turn: bool
) -> NDArray[np.float64]:
    join = np.maximum if in_turn else np.add
    return np.asarray(np.min(join(best[..., :, None], table), axis=-2))
