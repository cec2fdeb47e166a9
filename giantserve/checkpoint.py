"""A model's folder of safetensors files, and how a model's parameters are found in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from giantserve.errors import CheckpointError
from giantserve.safetensors_file import StoredTensor, read_header
from giantserve.tensor_source import TensorSource
from giantserve.weight_conversion import convert

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a checkpoint by name. Only headers are read until `read` is called."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError unless the folder has a config and every file of weights is
        whole."""
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is no folder; give the path of a downloaded model")
        config = path / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{path} has no config.json; it is not a model's folder")
        self.tensors: dict[str, StoredTensor] = {}
        digest = hashlib.sha256(config.read_bytes())
        for code in sorted(path.glob("*.py")):
            digest.update(code.read_bytes())
        expected = self._files()
        for file in sorted(expected):
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; download it again")
            tensors = read_header(file)
            if absent := sorted(expected[file] - tensors.keys()):
                raise CheckpointError(f"{file} lacks {absent[0]}, which the index says it holds")
            self.tensors.update(tensors)
            status = file.stat()
            # the change time as well: copying and unpacking may set the other one back
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            digest.update(f"{file.name} {status.st_size} {times}\n".encode())
        for name in sorted(self.tensors):
            digest.update(f"{name} {self.tensors[name].shape}\n".encode())
        self.fingerprint = digest.hexdigest()
        """Changes with the config, code that comes along, the names and shapes, and the files'
        sizes and times."""

    def read(self, name: str, box: Sequence[tuple[int, int]], out: torch.Tensor) -> None:
        """Write a box (a [start, stop) range a dimension) of a tensor into ``out``, in its
        dtype."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        self.tensors[name].read(box, out)

    def _files(self) -> dict[Path, set[str]]:
        """The files of weights, each with the tensors that an index says it holds."""
        if (self.path / SINGLE_FILE).is_file():
            return {self.path / SINGLE_FILE: set()}
        index = self.path / INDEX_FILE
        if index.is_file():
            files: dict[Path, set[str]] = {}
            try:
                for name, file in json.loads(index.read_bytes())["weight_map"].items():
                    files.setdefault(self.path / file, set()).add(name)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is malformed; download it again") from error
            return files
        if any(self.path.glob("pytorch_model*.bin*")):
            raise CheckpointError(
                f"{self.path} holds only pytorch_model.bin files, which are not safe to load; "
                "convert them: load the model with transformers and call save_pretrained"
            )
        raise CheckpointError(f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}")


class SourceMap:
    """Where each parameter and saved buffer of a model comes from. Reads only the slices asked
    for."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        """``model`` is on the meta device.

        Raises CheckpointError for tensors that are missing or of another shape,
        UnsupportedModelError for weights that transformers cannot convert either.
        """
        self._sources: dict[str, TensorSource] = convert(model, checkpoint.tensors)
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            for name, other in ((target, source), (source, target)):
                if name not in self._sources and other in self._sources:
                    self._sources[name] = self._sources[other]
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if missing := [name for name in expected if name not in self._sources]:
            raise CheckpointError(
                f"{checkpoint.path} lacks {len(missing)} of the model's {len(expected)} tensors: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; it belongs to "
                "another model, or is not complete"
            )
        for name, shape in expected.items():
            if self._sources[name].shape != shape:
                raise CheckpointError(
                    f"{name} is {self._sources[name].shape} in {checkpoint.path}, and {shape} "
                    "by its config.json"
                )

    def fill(
        self, name: str, dim: int | None, ranges: Sequence[tuple[int, int]], out: torch.Tensor
    ) -> None:
        """Write a parameter into ``out``: whole if ``dim`` is None, else ``ranges`` of ``dim`` in a
        row.

        Converts to the dtype of ``out``, which has the shape of the slice. KeyError for an unknown
        name.
        """
        source = self._sources[name]
        whole = tuple((0, size) for size in source.shape)
        if dim is None:
            source.read(whole, out)
            return
        dim %= len(whole)
        offset = 0
        for start, stop in ranges:
            box = (*whole[:dim], (start, stop), *whole[dim + 1 :])
            source.read(box, out.narrow(dim, offset, stop - start))
            offset += stop - start
        if offset != out.shape[dim]:
            raise ValueError(f"the ranges {ranges} of {name} do not fill {tuple(out.shape)}")
