"""Measurements to Ray's metrics, which Ray exports for Prometheus on every node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]


class RayMetrics:
    """Implements `giantserve.api.metrics.Metrics`, and turns an engine's stats into gauges."""

    def __init__(self, model: str) -> None:
        tags = {"model": model}
        self._requests = Counter(
            "giantserve_requests",
            "HTTP requests by route and status; 499 is a client that left.",
            ("model", "route", "status"),
        )
        self._requests.set_default_tags(tags)
        self._duration = _histogram("request_seconds", "Time of a whole request.", tags)
        self._first_token = _histogram("ttft_seconds", "Time to the first token.", tags)
        self._per_token = _histogram("tpot_seconds", "Time per token after the first.", tags)
        self._tokens = Counter(
            "giantserve_tokens", "Tokens by kind: prompt, cached, completion.", ("model", "kind")
        )
        self._tokens.set_default_tags(tags)
        self._engine = Gauge(
            "giantserve_engine",
            "Every number in the engine's stats, by its path.",
            ("model", "stat"),
        )
        self._engine.set_default_tags(tags)

    def request_finished(self, route: str, status: int, duration_s: float) -> None:
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._duration.observe(duration_s)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def time_per_token(self, seconds: float) -> None:
        self._per_token.observe(seconds)

    def tokens(self, prompt: int, cached: int, completion: int) -> None:
        for kind, count in (("prompt", prompt), ("cached", cached), ("completion", completion)):
            if count:
                self._tokens.inc(count, {"kind": kind})

    def engine_stats(self, stats: Mapping[str, Any]) -> None:
        """Set a gauge for every number, tagged with its path (``bytes.host.read``)."""
        for path, value in flatten(stats):
            self._engine.set(value, {"stat": path})


def flatten(stats: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings and lists, each with its dotted path."""
    for name, value in stats.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        elif isinstance(value, (list, tuple)):
            yield from flatten({str(i): item for i, item in enumerate(value)}, f"{path}.")
        elif isinstance(value, (int, float)):
            yield path, float(value)


def _histogram(name: str, description: str, tags: dict[str, str]) -> Histogram:
    histogram = Histogram(f"giantserve_{name}", description, _SECONDS, ("model",))
    histogram.set_default_tags(tags)
    return histogram
