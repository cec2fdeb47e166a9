"""Options as text (command line, YAML, ``key=value``) to an `EngineConfig`.

Unknown names are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from giantserve.config import EngineConfig
from giantserve.errors import ConfigError
from giantserve.units import parse_bytes

DEFAULT_MAX_BODY_BYTES = 4 * 2**20
"""Of a request over HTTP."""

_TRUE = frozenset({"true", "yes", "1", "on"})
_FALSE = frozenset({"false", "no", "0", "off"})


def parse_int(value: Any) -> int:
    """A whole number, or its text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    raise ConfigError(f"{value!r} is not a whole number")


def parse_positive(value: Any) -> int:
    """A whole number of at least 1, or its text."""
    number = parse_int(value)
    if number < 1:
        raise ConfigError(f"{value!r} is too small; the least is 1")
    return number


def parse_float(value: Any) -> float:
    """A number of at least 0, or its text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{value!r} is not a number") from None
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{value!r} must be at least 0 and finite")
    return number


def parse_bool(value: Any) -> bool:
    """True or false, or its text."""
    text = str(value).lower()
    if text not in _TRUE | _FALSE:
        raise ConfigError(f"{value!r} is neither true nor false")
    return text in _TRUE


def parse_text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{value!r} is not a text")
    return value


def parse_counts(value: Any) -> tuple[int, ...]:
    """Numbers above 0: a list of them, or text like "5,6,11"."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise ConfigError(f"{value!r} is not a list of numbers; write them like 5,6,11")
    return tuple(parse_positive(part) for part in parts)


def _parse_path(value: Any) -> Path:
    return value if isinstance(value, Path) else Path(parse_text(value)).expanduser()


_BY_TYPE: dict[str, Callable[[Any], Any]] = {
    "str": parse_text,
    "int": parse_int,
    "float": parse_float,
    "bool": parse_bool,
    "Path": _parse_path,
}
_BY_NAME: dict[str, Callable[[Any], Any]] = {
    "device_memory": parse_bytes,
    "host_memory": parse_bytes,
    "nvme_memory": parse_bytes,
    "prefix_memory": parse_bytes,
    "tensor_parallel": parse_positive,
    "pipeline_parallel": parse_positive,
    "layer_split": parse_counts,
    "prompt_tokens": parse_positive,
    "output_tokens": parse_positive,
    "concurrency": parse_positive,
    "max_model_len": parse_positive,
    "max_num_seqs": parse_positive,
    "max_num_batched_tokens": parse_positive,
    "block_size": parse_positive,
    "max_queued_requests": parse_positive,
    "threads_per_shard": parse_positive,
}
ENGINE_OPTIONS: dict[str, Callable[[Any], Any]] = {
    field.name: _BY_NAME.get(field.name) or _BY_TYPE[str(field.type).removesuffix(" | None")]
    for field in fields(EngineConfig)
}


def parse_options(
    given: Mapping[str, Any], parsers: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Parse each value by its name; None means: leave it at the default.

    Raises ConfigError that names the option, for an unknown one together with those there are.
    """
    parsed = {}
    for name, value in given.items():
        if name not in parsers:
            raise ConfigError(f"unknown option '{name}'; there are {', '.join(sorted(parsers))}")
        if value is None:
            continue
        try:
            parsed[name] = parsers[name](value)
        except ConfigError as error:
            raise ConfigError(f"option '{name}': {error}") from None
    return parsed


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """The config that the options describe; ``model`` must be among them."""
    parsed = parse_options(options, ENGINE_OPTIONS)
    if "model" not in parsed:
        raise ConfigError("option 'model' is missing; give the path of a checkpoint folder")
    return EngineConfig(**parsed)
