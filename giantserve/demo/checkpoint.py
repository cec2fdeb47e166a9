"""A checkpoint of random weights, in the layout of Hugging Face, written once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file

from giantserve.demo.shape import DemoShape
from giantserve.demo_tokenizer import train_tokenizer
from giantserve.errors import ConfigError

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""

WEIGHT_SCALE = 0.02


def write_checkpoint(shape: DemoShape, folder: Path, progress: Progress) -> None:
    """Write ``folder``, a file a layer. It appears whole or not at all.

    Raises ConfigError where the disk has too little room or the folder cannot be written.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        train_tokenizer(unfinished, shape.vocab_size)
        _write_weights(shape, unfinished, progress)
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigError(
            f"cannot write {folder}: {error.strerror or error}; choose another --folder"
        ) from None


def _write_weights(shape: DemoShape, folder: Path, progress: Progress) -> None:
    from transformers import AutoModelForCausalLM

    config = shape.config(shape.vocab_size)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    total = 2 * sum(size.numel() for size in sizes.values())
    if shutil.disk_usage(folder).free < 2 * total:
        raise ConfigError(
            f"{folder.parent} has room for {shutil.disk_usage(folder).free / 1e9:.1f} GB, the "
            f"checkpoint and its packed shards need {2 * total / 1e9:.1f}; choose another --folder"
        )
    files: dict[str, str] = {}
    done = 0
    generator = torch.Generator().manual_seed(0)
    for index, names in enumerate(_by_layer(sizes)):
        file = f"model-{index:05d}.safetensors"
        tensors = {name: _random(sizes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress(done, total)
    index_file = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def _by_layer(names: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Names of parameters in the model's order, those of a layer together."""
    for _, group in groupby(names, lambda name: name.split(".")[:3]):
        yield list(group)


def _random(size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Vectors scale what is normalised, so they are ones."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, generator=generator).mul_(WEIGHT_SCALE).to(torch.bfloat16)
