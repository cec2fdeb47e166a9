"""What is left of a transformers model on one stage, and where its weights go."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from giantserve.models.patching import replace_forward
from partition.profile import ModelProfile, Unit, UnitKind


def path_of(model: nn.Module, target: nn.Module) -> str:
    """Where a module stands in its model; StopIteration for one that is not in it."""
    path: str = next(name for name, module in model.named_modules() if module is target)
    return path


def empty(module: nn.Module) -> None:
    """Drop everything below a module that another stage runs, but keep its plain attributes."""
    module._modules.clear()
    module._parameters.clear()
    module._buffers.clear()


def silence_inputs(model: nn.Module, profile: ModelProfile) -> None:
    """On a later stage the result of what stands before the layers is thrown away: make it
    cheap."""
    for unit in profile.units:
        if unit.stage_end != "first":
            continue
        for spec in unit.parameters:
            module = model.get_submodule(spec.name.rpartition(".")[0])
            is_embedding = isinstance(module, nn.Embedding)
            replace_forward(module, _zero if is_embedding else _pass_through)


def _pass_through(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden


def _zero(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros((), device=ids.device)


def parameter_slots(
    model: nn.Module, units: tuple[Unit, ...]
) -> dict[str, list[tuple[nn.Module, str, str]]]:
    """For each unit the (module, attribute, tensor name) triples its tensors are bound to.

    A tied matrix is bound to the head, too: the embedding reads rows and is bound to none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    slots: dict[str, list[tuple[nn.Module, str, str]]] = {}
    for unit in units:
        slots[unit.name] = []
        for spec in unit.parameters:
            path, _, leaf = spec.name.rpartition(".")
            module = model.get_submodule(path)
            if unit.kind is UnitKind.HEAD and isinstance(module, nn.Embedding):
                module, leaf = head, "weight"
            slots[unit.name].append((module, leaf, spec.name))
    return slots


@torch.no_grad()
def materialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) their
    values.

    Uses the initialisers that transformers runs for parameters missing from a checkpoint;
    parameters stay on the meta device.
    """
    for module in model.modules():
        names = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not names:
            continue
        for name in names:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device=device)
        model._init_weights(module)
