"""Frozen dataclasses to and from plain JSON/YAML values, refusing whatever the types do not
declare."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from typing import Any, TypeVar

from partition.byte_size import parse_bytes
from partition.errors import FieldError, PlanError

T = TypeVar("T")

SIZES = ("_bytes", "host_memory", "capacity")
"""How the names of fields end that take a size ("2GiB") for an integer."""


def encode(value: Any) -> Any:
    """``value`` as dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(cls: type[T], data: Any, where: str = "") -> T:
    """Rebuild a ``cls`` from `encode`'s form. Fields named as in `SIZES` take sizes, too.

    Raises FieldError naming the key (as a path from ``where``) that is missing, unknown or of a
    wrong type.
    """
    return typing.cast(T, _decode(cls, data, where))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return None if data is None else _decode(kinds[0], data, where)
    if origin is tuple:
        expect(isinstance(data, list), where, "a list", data)
        item = typing.get_args(kind)[0]
        return tuple(_decode(item, value, f"{where}[{i}]") for i, value in enumerate(data))
    if origin is dict:
        expect(
            isinstance(data, dict) and all(isinstance(k, str) for k in data), where, "a map", data
        )
        item = typing.get_args(kind)[1]
        return {key: _decode(item, value, f"{where}.{key}") for key, value in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        values = [member.value for member in kind]
        expect(data in values, where, f"one of {', '.join(map(str, values))}", data)
        return kind(data)
    return _decode_scalar(kind, data, where)


def _decode_dataclass(cls: Any, data: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    dot = f"{where}." if where else ""
    known_keys(data, where, tuple(fields))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{dot}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FieldError(f"{dot}{name}", "missing; add it")
    try:
        return cls(**values)
    except FieldError as error:
        raise error.below(where) from None
    except PlanError as error:
        raise FieldError(where, str(error)) from None


def known_keys(data: Any, where: str, known: tuple[str, ...]) -> None:
    """Raise FieldError unless ``data``, which stands at ``where``, is a map of ``known`` keys."""
    expect(isinstance(data, dict), where, "a map", data)
    for key in data:
        if key not in known:
            path = f"{where}.{key}" if where else str(key)
            raise FieldError(path, f"unknown key; known are {', '.join(known)}")


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is bool:
        expect(isinstance(data, bool), where, "true or false", data)
    elif kind is str:
        expect(isinstance(data, str), where, "a string", data)
    elif kind is int:
        if isinstance(data, str) and where.endswith(SIZES):
            try:
                data = parse_bytes(data)
            except ValueError as error:
                raise FieldError(where, str(error)) from None
        expect(isinstance(data, int) and not isinstance(data, bool), where, "an integer", data)
    elif kind is float:
        if isinstance(data, str):  # YAML reads 1e9 as a string
            try:
                data = float(data)
            except ValueError:
                expect(False, where, "a number", data)
        number = isinstance(data, (int, float)) and not isinstance(data, bool)
        expect(number and math.isfinite(data), where, "a finite number", data)
        data = float(data)
    else:
        raise AssertionError(f"no codec for {kind}")
    return data


def expect(holds: bool, where: str, what: str, data: Any) -> None:
    """Raise FieldError unless ``data``, which stands at ``where``, is what it must be."""
    if not holds:
        containers = {dict: "a map", list: "a list", type(None): "empty"}
        shown = containers.get(type(data)) or repr(data)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise FieldError(where, f"must be {what}, but is {shown}")
