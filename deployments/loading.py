"""How far the replicas are with loading, told through Ray's key-value store."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ray.experimental import internal_kv
from ray.util import list_named_actors
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from giantserve.errors import EngineDeadError
from giantserve.executor.messages import LoadProgress

logger = logging.getLogger(__name__)

KEY_PREFIX = "giantserve:loading:"
REPORT_INTERVAL_S = 0.2
SHOWN_AFTER_S = 2.0


class LoadingReport:
    """The replica's side: a callback for the engine, under the name of the replica's actor."""

    def __init__(self, actor_name: str) -> None:
        self._key = KEY_PREFIX + actor_name
        self._ranks: dict[int, tuple[str, int, int]] = {}
        self._last_s = 0.0
        self._failed = False

    def __call__(self, rank: int, progress: LoadProgress) -> None:
        """Store what a shard said, at most every `REPORT_INTERVAL_S`."""
        self._ranks[rank] = (progress.what, progress.done_bytes, progress.total_bytes)
        now_s = time.monotonic()
        if now_s - self._last_s >= REPORT_INTERVAL_S:
            self._last_s = now_s
            self._put({"ranks": self._ranks})

    def finish(self) -> None:
        """Say that the replica is loaded."""
        self._put({"loaded": True})

    def fail(self, error: Exception) -> None:
        """Say that the load failed."""
        self._failed = True
        self._put({"error": f"{type(error).__name__}: {error}"})

    def close(self) -> None:
        """Forget the report of a replica that ends, unless somebody has to learn of its failure."""
        if not self._failed:
            with _whether_or_not_ray_answers():
                internal_kv._internal_kv_del(self._key)

    def _put(self, report: dict[str, Any]) -> None:
        with _whether_or_not_ray_answers():
            internal_kv._internal_kv_put(self._key, json.dumps(report))


@contextlib.contextmanager
def _whether_or_not_ray_answers() -> Iterator[None]:
    """A report that is not told must not end the engine that loads."""
    try:
        yield
    except Exception:
        logger.warning("Ray's key-value store does not take the load's progress", exc_info=True)


@dataclass(slots=True)
class Loading:
    """``ranks``, by replica and shard: what it does, the bytes done and the bytes there are.
    ``num_loaded``: how many replicas are through with it."""

    ranks: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    num_loaded: int = 0


def read_loading() -> Loading:
    """What the living replicas said last. Raises EngineDeadError where a load failed."""
    found = Loading()
    living = {actor["name"] for actor in list_named_actors(all_namespaces=True)}
    for number, (actor_name, report) in enumerate(sorted(_reports().items())):
        if "error" in report:
            raise EngineDeadError(report["error"].partition(": ")[2])
        if actor_name not in living:
            continue
        found.num_loaded += report.get("loaded", False)
        for rank, (what, done, total) in sorted(report.get("ranks", {}).items()):
            found.ranks[f"replica {number} shard {rank}"] = (what, done, total)
    return found


def _reports() -> dict[str, dict[str, Any]]:
    """By the name of a replica's actor."""
    keys = [key.decode() for key in internal_kv._internal_kv_list(KEY_PREFIX)]
    stored = {key.removeprefix(KEY_PREFIX): internal_kv._internal_kv_get(key) for key in keys}
    return {actor_name: json.loads(value) for actor_name, value in stored.items() if value}


def forget_loading() -> None:
    """Remove what the replicas of an earlier deployment left."""
    for key in internal_kv._internal_kv_list(KEY_PREFIX):
        internal_kv._internal_kv_del(key)


@contextlib.contextmanager
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
        shown = Loading()
        while not over.wait(REPORT_INTERVAL_S):
            with contextlib.suppress(EngineDeadError):  # whoever waits for the load raises it
                shown = read_loading()
            for who, (what, done, total) in shown.ranks.items():
                progress.update(starting, visible=False)
                if who not in tasks:
                    tasks[who] = progress.add_task(who)
                progress.update(
                    tasks[who], description=f"{who}: {what}", completed=done, total=total
                )
