"""DeepSpeed's aio handle behind the storage interface, where its op is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvcache.arena import Arena
from kvcache.errors import BackendUnavailableError, StorageError
from kvcache.storage import BACKENDS, StorageBackend
from kvcache.tier import Tier

SIZE = 1 << 20


@pytest.fixture
def backend() -> Iterator[StorageBackend]:
    try:
        made = BACKENDS["deepnvme"]()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def test_what_is_written_is_read(backend: StorageBackend, tmp_path: Path) -> None:
    arena = Arena(Tier.HOST, 2 * SIZE)
    data, found = arena.allocate(SIZE), arena.allocate(SIZE)
    data.copy_(torch.randint(0, 256, (SIZE,), dtype=torch.uint8))
    file = backend.open(tmp_path / "units", writable=True)
    backend.write(file, 0, data)
    quarters = range(0, SIZE, SIZE // 4)
    reads = [backend.submit(file, at, found[at : at + SIZE // 4]) for at in quarters]
    for read in reads:
        read.result()
    file.close()
    assert torch.equal(data, found)


def test_a_file_that_is_too_short_is_an_error(backend: StorageBackend, tmp_path: Path) -> None:
    """And not the end of the process, which is what the handle makes of it."""
    (tmp_path / "units").write_bytes(bytes(8192))
    file = backend.open(tmp_path / "units")
    with pytest.raises(StorageError, match="it was longer when it was made"):
        backend.read(file, 4096, Arena(Tier.HOST, 8192).allocate(8192))
    file.close()


def test_an_op_that_does_not_load_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "async_io.so").write_bytes(b"no library")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match="DS_BUILD_AIO=1"):
        BACKENDS["deepnvme"]()
