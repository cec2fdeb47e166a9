"""The options of a deployment: how many replicas, their resources, their limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from giantserve.config import EngineConfig
from giantserve.options import (
    DEFAULT_MAX_BODY_BYTES,
    ENGINE_OPTIONS,
    engine_config,
    parse_float,
    parse_options,
    parse_positive,
    parse_text,
)
from giantserve.units import parse_bytes

API_KEY_VARIABLE = "GIANTSERVE_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentOptions:
    """What shapes the Serve deployment around the engine.

    The CPUs are Ray's logical ones: they decide where things are placed, not how many threads run.
    ``gpus_per_shard`` None: one where the engine's device is CUDA. Without ``api_key`` the server
    is open; its value never shows in a repr.
    """

    num_replicas: int = 1
    cpus_per_replica: float = 0.1
    cpus_per_shard: float = 0.5
    gpus_per_shard: float | None = None
    max_ongoing_requests: int = 4096
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    api_key: str | None = field(default=None, repr=False)
    health_check_period_s: float = 2.0
    health_check_timeout_s: float = 60.0
    drain_timeout_s: float = 60.0


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "num_replicas": parse_positive,
    "cpus_per_replica": parse_float,
    "cpus_per_shard": parse_float,
    "gpus_per_shard": parse_float,
    "max_ongoing_requests": parse_positive,
    "max_body_bytes": parse_bytes,
    "api_key": parse_text,
    "health_check_period_s": parse_float,
    "health_check_timeout_s": parse_float,
    "drain_timeout_s": parse_float,
}
assert set(_PARSERS) == {option.name for option in fields(DeploymentOptions)}


def parse_args(args: Mapping[str, Any]) -> tuple[EngineConfig, DeploymentOptions]:
    """Split ``key=value`` arguments; raises ConfigError naming the option that is wrong or unknown.

    The API key may come from the environment variable GIANTSERVE_API_KEY instead.
    """
    parse_options(dict.fromkeys(args), {**ENGINE_OPTIONS, **_PARSERS})
    config = engine_config({name: value for name, value in args.items() if name in ENGINE_OPTIONS})
    given = {name: value for name, value in args.items() if name in _PARSERS}
    given.setdefault("api_key", os.environ.get(API_KEY_VARIABLE) or None)
    return config, DeploymentOptions(**parse_options(given, _PARSERS))
