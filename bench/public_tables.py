"""Public tables of measured times, as Vidur's profiles write them (Agrawal et al., 2024): CSV, in
milliseconds."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

Key = TypeVar("Key")
Points = dict[tuple[str, int, int], float]
"""Seconds by (operator, tokens, tensor-parallel degree)."""

Messages = dict[tuple[int, int, int], float]
"""Seconds by (workers, devices per node, bytes)."""


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def medians(pairs: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    """The median of each key's milliseconds, in seconds."""
    found: dict[Key, list[float]] = defaultdict(list)
    for key, milliseconds in pairs:
        found[key].append(milliseconds)
    return {key: statistics.median(values) * 1e-3 for key, values in found.items()}


def read_operators(path: Path) -> Points:
    """Every column's median time."""
    prefix, suffix = "time_stats.", ".median"
    return medians(
        (
            (
                column.removeprefix(prefix).removesuffix(suffix),
                int(row["num_tokens"]),
                int(row["num_tensor_parallel_workers"]),
            ),
            float(value),
        )
        for row in read_rows(path)
        for column, value in row.items()
        if column.startswith(prefix) and column.endswith(suffix)
    )


def read_messages(path: Path, collective: str) -> Messages:
    return medians(
        (
            (int(row["num_workers"]), int(row["devices_per_node"]), int(row["size"])),
            float(row[f"time_stats.{collective}.median"]),
        )
        for row in read_rows(path)
    )
