"""Direct reads and writes by DeepSpeed's ``aio_handle`` (libaio, many requests a thread)."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kvcache.errors import BackendUnavailableError, StorageError
from kvcache.storage import DirectFile, StorageBackend, check_aligned

BLOCK_BYTES = 1 << 20
QUEUE_DEPTH = 32
NUM_THREADS = 4
NAME, PINNING = "async_io", "pin_memory"
HOW_TO_BUILD = (
    "deepnvme needs DeepSpeed's async_io op, which is not built here; install libaio's headers and "
    "run DS_BUILD_AIO=1 pip install --force-reinstall deepspeed, or use the posix backend"
)


class DeepNVMeBackend(StorageBackend):
    """One handle, fed in order by one thread; the handle spreads each request over its own
    threads."""

    def __init__(self) -> None:
        """Raises BackendUnavailableError where DeepSpeed's op is not built: nothing is compiled
        here."""
        operator = _load_operator()
        self._handle = operator.aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, NUM_THREADS)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="deepnvme")

    def read(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> None:
        self.submit(file, offset, buffer).result()

    def submit(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> Future[None]:
        check_aligned(offset, buffer)
        return self._pool.submit(self._read, file, offset, buffer)

    def submit_write(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> Future[None]:
        check_aligned(offset, buffer)
        return self._pool.submit(self._run, self._handle.sync_pwrite, file, offset, buffer)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _read(self, file: DirectFile, offset: int, buffer: torch.Tensor) -> None:
        # the handle ends the process where a file is too short
        if os.fstat(file.descriptor).st_size < offset + buffer.numel():
            failure = "the file ends here; it was longer when it was made"
            raise StorageError(str(file.path), offset, failure)
        self._run(self._handle.sync_pread, file, offset, buffer)

    def _run(self, call: Any, file: DirectFile, offset: int, buffer: torch.Tensor) -> None:
        try:
            completed = call(buffer, str(file.path), offset)
        except RuntimeError as error:
            raise StorageError(str(file.path), offset, str(error)) from error
        if completed < 0:
            raise StorageError(str(file.path), offset, f"aio_handle returned {completed}")


def _is_built() -> bool:
    """Whether there is an async_io extension to load, told without importing DeepSpeed."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return False
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")
    places = (Path(spec.origin).parent, Path(compiled))
    return any(next(place.rglob(f"{NAME}*.so"), None) is not None for place in places)


def _load_operator() -> Any:
    """The built async_io extension: installed with DeepSpeed, or compiled by an earlier
    ``load()``."""
    if not _is_built():
        raise BackendUnavailableError(HOW_TO_BUILD)
    try:
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.op_builder import AsyncIOBuilder
        from torch.utils.cpp_extension import _get_build_directory
    except ImportError as error:
        raise BackendUnavailableError(f"deepnvme needs DeepSpeed: {error}") from error
    builder = AsyncIOBuilder()
    if installed_ops.get(builder.name, False):
        return builder.load(verbose=False)
    libraries = [
        Path(_get_build_directory(name, verbose=False)) / f"{name}.so" for name in (PINNING, NAME)
    ]
    spec = importlib.util.spec_from_file_location(NAME, libraries[1])
    if not libraries[1].is_file() or spec is None or spec.loader is None:
        raise BackendUnavailableError(HOW_TO_BUILD)
    try:
        if libraries[0].is_file():  # what the op calls to lock memory, in DeepSpeed 0.19 and later
            ctypes.CDLL(str(libraries[0]), mode=ctypes.RTLD_GLOBAL)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(f"{error}; {HOW_TO_BUILD}") from error
    return module
