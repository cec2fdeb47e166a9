"""How far the replicas are with loading, told through Ray's key-value store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.experimental import internal_kv
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from giantserve.executor.messages import LoadProgress

KEY_PREFIX = "giantserve:loading:"
REPORT_INTERVAL_S = 0.2
SHOWN_AFTER_S = 2.0


class LoadingReport:
    """The replica's side: a callback for the engine."""

    def __init__(self, replica_id: str) -> None:
        self._key = KEY_PREFIX + replica_id
        self._ranks: dict[int, tuple[str, int, int]] = {}
        self._last_s = 0.0

    def __call__(self, rank: int, progress: LoadProgress) -> None:
        """Store what a shard said, at most every `REPORT_INTERVAL_S`."""
        self._ranks[rank] = (progress.what, progress.done_bytes, progress.total_bytes)
        now_s = time.monotonic()
        if now_s - self._last_s >= REPORT_INTERVAL_S:
            self._last_s = now_s
            internal_kv._internal_kv_put(self._key, json.dumps(self._ranks))

    def close(self) -> None:
        """Forget the report: the replica is loaded."""
        internal_kv._internal_kv_del(self._key)


def read_loading() -> dict[str, tuple[str, int, int]]:
    """By replica and shard: what it does, the bytes done and the bytes there are."""
    found: dict[str, tuple[str, int, int]] = {}
    for number, key in enumerate(sorted(internal_kv._internal_kv_list(KEY_PREFIX))):
        stored = internal_kv._internal_kv_get(key)
        ranks: dict[str, Any] = json.loads(stored) if stored else {}
        for rank, (what, done, total) in sorted(ranks.items()):
            found[f"replica {number} shard {rank}"] = (what, done, total)
    return found


@contextmanager
def shown_loading() -> Iterator[None]:
    """Bars on stderr, one a shard, while the body runs; nothing where it is over soon."""
    over = threading.Event()
    watcher = threading.Thread(target=_show, args=(over,), name="loading", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _show(over: threading.Event) -> None:
    if over.wait(SHOWN_AFTER_S):
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        starting = progress.add_task("starting Ray Serve and the replicas", total=None)
        tasks: dict[str, Any] = {}
        while not over.wait(REPORT_INTERVAL_S):
            for who, (what, done, total) in read_loading().items():
                progress.update(starting, visible=False)
                if who not in tasks:
                    tasks[who] = progress.add_task(who)
                progress.update(
                    tasks[who], description=f"{who}: {what}", completed=done, total=total
                )
