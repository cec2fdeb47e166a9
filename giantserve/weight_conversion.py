"""From a checkpoint's names and layouts to the model's, by transformers' own conversion rules.

The common rules (rename, stack, concatenate, transpose, chunk) become `TensorSource`s, of which any
slice can be read; for the others transformers' own operations run on whole tensors, one parameter
at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from giantserve.errors import UnsupportedModelError
from giantserve.safetensors_file import StoredTensor
from giantserve.tensor_source import (
    Computed,
    Concatenated,
    Narrowed,
    Stacked,
    Stored,
    TensorSource,
    Transposed,
)

Parts = dict[str, list[TensorSource]]
"""Sources by the pattern that they matched, or by the pattern of the target they belong to."""


@dataclass(slots=True)
class _Conversion:
    """One use of a converter: the stored tensors that feed it, by the pattern they matched."""

    converter: Any
    names: dict[str, list[str]] = field(default_factory=dict)


def convert(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> dict[str, TensorSource]:
    """The source of every parameter that the checkpoint's ``tensors`` give; ``model`` is on meta.

    Raises UnsupportedModelError for quantised checkpoints and conversions that fail.
    """
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({quantization}); convert it to bfloat16 with "
            "transformers first"
        )
    expected = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    sources: dict[str, TensorSource] = {}
    conversions: dict[str, _Conversion] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected
        )
        if target not in expected and name in expected:
            target, pattern = name, None
        if target not in expected:
            continue  # weights of a part that this model does not have
        if pattern is None:
            sources[target] = Stored(tensors[name])
        else:
            conversion = conversions.setdefault(target, _Conversion(by_pattern[pattern]))
            conversion.names.setdefault(pattern, []).append(name)
    for target, conversion in conversions.items():
        sources.update(_piecewise(model, target, conversion, tensors))
    return sources


def _piecewise(
    model: PreTrainedModel,
    target: str,
    conversion: _Conversion,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, TensorSource]:
    converter = conversion.converter
    parts: Parts = {
        pattern: [Stored(tensors[name]) for name in names]
        for pattern, names in conversion.names.items()
    }
    for operation in converter.operations:
        rule = _RULES.get(type(operation))
        applied = rule(operation, parts, converter, model, target) if rule is not None else None
        if applied is None:
            return _computed(model, target, conversion, tensors)
        parts = applied
    full_name = target.replace("*.", "0.")
    for pattern in parts:
        if pattern in full_name:
            prefix, _, suffix = full_name.partition(pattern)
            return {prefix + key + suffix: values[0] for key, values in parts.items()}
    return {key: values[0] for key, values in parts.items()}


def _computed(
    model: PreTrainedModel,
    target: str,
    conversion: _Conversion,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, TensorSource]:
    """Run the converter on meta tensors to learn what it gives, and on real ones when that is
    read."""

    def run(load: Callable[[StoredTensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(conversion.converter)
        for pattern, names in conversion.names.items():
            for name in names:
                converter.add_tensor(target, name, pattern, lambda name=name: load(tensors[name]))
        given = converter.convert(target, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in given.items()}

    def read(tensor: StoredTensor) -> torch.Tensor:
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.read([(0, size) for size in tensor.shape], values)
        return values

    try:
        shapes = run(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot convert the checkpoint's tensors to {target}: {error}"
        ) from error
    return {
        key: Computed(tuple(value.shape), lambda key=key: run(read)[key])  # type: ignore[misc]
        for key, value in shapes.items()
    }


def _stack(operation: Any, parts: Parts, rule: Any, model: Any, target: str) -> Parts | None:
    if len(parts) == 1 and len(rule.target_patterns) > 1:
        return None
    stacked = {key: [Stacked(values, operation.dim)] for key, values in parts.items()}
    return dict(
        zip(rule.target_patterns if len(parts) == 1 else parts, stacked.values(), strict=True)
    )


def _concatenate(operation: Any, parts: Parts, rule: Any, model: Any, target: str) -> Parts | None:
    if len(rule.target_patterns) > 1:
        return None
    values = [value for key in rule.source_patterns for value in parts.get(key, [])]
    return {rule.target_patterns[0]: [Concatenated(values, operation.dim)]}


def _transpose(operation: Any, parts: Parts, rule: Any, model: Any, target: str) -> Parts | None:
    if len(parts) != 1 or len(rule.target_patterns) > 1:
        return None
    value = next(iter(parts.values()))[0]
    if not operation.check_dims or value.shape != tuple(model.get_parameter(target).shape):
        value = Transposed(value, operation.dim0, operation.dim1)
    return {rule.target_patterns[0]: [value]}


def _chunk(operation: Any, parts: Parts, rule: Any, model: Any, target: str) -> Parts | None:
    if len(parts) != 1 or operation.num_shards_attribute is not None:
        return None
    value = next(iter(parts.values()))[0]
    size = value.shape[operation.dim]
    step = -(-size // len(rule.target_patterns))
    return {
        key: [Narrowed(value, operation.dim, min(size, i * step), min(size, (i + 1) * step))]
        for i, key in enumerate(rule.target_patterns)
    }


_RULES: dict[type, Callable[[Any, Parts, Any, Any, str], Parts | None]] = {
    MergeModulelist: _stack,
    Concatenate: _concatenate,
    Transpose: _transpose,
    Chunk: _chunk,
}
"""What each operation does to sources; None where this use of it needs whole tensors."""
