"""Reads slices of safetensors files with preadv: nothing is mapped, so only what is read is
resident.

Format: https://huggingface.co/docs/safetensors/index#format (8 bytes of header length, JSON header,
data).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from giantserve.errors import CheckpointError

SCRATCH_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file; its bytes begin at ``offset``, row-major."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, box: Sequence[tuple[int, int]], out: torch.Tensor) -> None:
        """Write the box, one [start, stop) range a dimension, into ``out``, converted to its dtype.

        Reads no rows outside the box, and whole rows of the last two dimensions where the last one
        is cut. Uses at most 16 MiB of scratch memory, or one row. Raises CheckpointError if the
        file is too short.
        """
        if len(box) != len(self.shape) or tuple(out.shape) != tuple(b - a for a, b in box):
            raise ValueError(f"box {box} of a tensor {self.shape} does not fill {tuple(out.shape)}")
        if out.numel() == 0:
            return
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._read(descriptor, self.offset, self.shape, tuple(box), out)
            size = math.prod(self.shape) * self.dtype.itemsize
            os.posix_fadvise(descriptor, self.offset, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def _read(
        self,
        descriptor: int,
        offset: int,
        shape: tuple[int, ...],
        box: tuple[tuple[int, int], ...],
        out: torch.Tensor,
    ) -> None:
        if not shape:
            shape, box, out = (1,), ((0, 1),), out.unsqueeze(0)
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        start, stop = box[0]
        whole_rows = all(span == (0, size) for span, size in zip(box[1:], shape[1:], strict=True))
        if not whole_rows and len(shape) > 2:
            for index in range(start, stop):
                self._read(
                    descriptor, offset + index * row_bytes, shape[1:], box[1:], out[index - start]
                )
            return
        if whole_rows and out.dtype == self.dtype and out.is_contiguous():
            view = out.detach().view(-1).view(torch.uint8).numpy().data
            self._fill(descriptor, offset + start * row_bytes, view)
            return
        rows = max(1, min(stop - start, SCRATCH_BYTES // row_bytes))
        scratch = torch.empty(rows * row_bytes, dtype=torch.uint8)
        inner = tuple(slice(first, last) for first, last in box[1:])
        for row in range(start, stop, rows):
            count = min(rows, stop - row)
            part = scratch[: count * row_bytes]
            self._fill(descriptor, offset + row * row_bytes, part.numpy().data)
            values = part.view(self.dtype).view(count, *shape[1:])
            out[row - start : row - start + count].copy_(values[(slice(None), *inner)])

    def _fill(self, descriptor: int, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            moved = os.preadv(descriptor, [view[done:]], offset + done)
            if moved == 0:
                raise CheckpointError(
                    f"{self.path} ends {len(view) - done} bytes too early: it "
                    "was cut since it was opened; download it again"
                )
            done += moved


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises CheckpointError unless it is whole and well
    formed."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: it has {size} bytes and its "
                    f"header says {length}; download it again"
                )
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("not an object")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no safetensors file: its header is malformed ({error})"
        ) from error
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, stop = _parse(path, name, entry, 8 + length)
        tensors[name] = tensor
        end = max(end, stop)
    if size < end:
        raise CheckpointError(
            f"{path} is truncated: {end - size} of its {end} bytes are missing; download it again"
        )
    return tensors


def _parse(path: Path, name: str, entry: dict[str, object], base: int) -> tuple[StoredTensor, int]:
    try:
        dtype = DTYPES[str(entry["dtype"])]
        shape = tuple(int(size) for size in entry["shape"])  # type: ignore[attr-defined]
        begin, stop = (int(offset) for offset in entry["data_offsets"])  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the entry of {name} is malformed or of an unknown dtype: {entry}"
        ) from error
    if stop - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise CheckpointError(
            f"{path}: {name} has {stop - begin} bytes, and its shape {shape} needs another number"
        )
    return StoredTensor(path=path, offset=base + begin, shape=shape, dtype=dtype), base + stop
