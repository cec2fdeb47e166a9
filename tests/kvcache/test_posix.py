"""Direct reads and writes of real files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kvcache.arena import Arena
from kvcache.errors import BackendUnavailableError, StorageError
from kvcache.storage import BACKENDS, DirectFile, StorageBackend
from kvcache.storage.posix import PosixBackend, _transfer, _Unwanted
from kvcache.tier import Tier


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder on the disk (O_DIRECT) and one on /dev/shm (which refuses it before Linux 6.6)."""
    if request.param == "disk":
        return tmp_path
    return Path(request.getfixturevalue("shm_folder"))


@pytest.fixture
def shm_folder(tmp_path: Path) -> Path:
    folder = Path("/dev/shm") / f"kvcache-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.fixture
def backend() -> StorageBackend:
    backend = PosixBackend(chunk_bytes=64 << 10, num_threads=3)
    yield backend
    backend.close()


def buffer_of(num_bytes: int) -> torch.Tensor:
    return Arena(Tier.HOST, num_bytes).allocate(num_bytes)


def pattern(num_bytes: int) -> torch.Tensor:
    data = buffer_of(num_bytes)
    return data.copy_(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8))


def test_what_is_written_is_read_at_any_offset(folder: Path, backend: StorageBackend) -> None:
    data = pattern(1 << 20)
    file = backend.open(folder / "f", writable=True)
    backend.write(file, 0, data)
    backend.write(file, 1 << 20, data)
    assert (folder / "f").stat().st_mode & 0o777 == 0o600
    assert (folder / "f").stat().st_size == 2 << 20
    for offset, size in [(0, 1 << 20), (4096, 8192), (1 << 19, 1 << 20), (65536, 4096)]:
        expected = torch.cat([data, data])[offset : offset + size]
        direct, queued = buffer_of(size), buffer_of(size)
        backend.read(file, offset, direct)
        backend.submit(file, offset, queued).result()
        assert torch.equal(direct, expected) and torch.equal(queued, expected)
    file.close()
    file.close()


def test_many_reads_in_flight(tmp_path: Path, backend: StorageBackend) -> None:
    data = pattern(4 << 20)
    file = backend.open(tmp_path / "f", writable=True)
    backend.write(file, 0, data)
    target = buffer_of(4 << 20)
    step = 256 << 10
    futures = [backend.submit(file, at, target[at : at + step]) for at in range(0, 4 << 20, step)]
    for future in futures:
        future.result()
    assert torch.equal(target, data)
    assert backend.submit(file, 0, target[:0]).result() is None
    file.close()


def test_a_stretch_of_a_file_goes_to_parts_of_memory(folder: Path, backend: PosixBackend) -> None:
    page, data = 4096, pattern(16 * 4096)
    view, target = data.numpy().data, buffer_of(16 * 4096)
    file = backend.open(folder / "f", writable=True)
    backend.write(file, 0, data)
    parts = [target.numpy().data[n * page : m * page] for n, m in ((9, 12), (0, 2), (4, 5))]
    first = (0, [page, parts[0], 2 * page, parts[1]])
    backend.submit_stretches(file, [first, (8 * page, parts[2:])]).result()
    assert [bytes(part) for part in parts] == [
        view[page : 4 * page],
        view[6 * page : 8 * page],
        view[8 * page : 9 * page],
    ]
    apart = [(2 * page, parts[1:2]), (14 * page, parts[2:])]
    backend.submit_stretches(file, apart, write=True).result()
    found = (folder / "f").read_bytes()
    assert found[2 * page : 4 * page] == bytes(parts[1])
    assert (
        found[14 * page : 15 * page] == bytes(parts[2]) and found[15 * page :] == view[15 * page :]
    )
    file.close()


def test_parts_that_nobody_wants_come_to_places_of_their_own() -> None:
    """As a file system that checks what came to memory needs it."""
    wanted = buffer_of(4096).numpy().data
    views = _Unwanted().filled_in([4096, wanted, 8192, 4096])
    assert [len(view) for view in views] == [4096, 4096, 8192, 4096]
    for number, view in enumerate(views):
        view[:] = bytes([number]) * len(view)
    assert [set(view) for view in views] == [{0}, {1}, {2}, {3}] and set(wanted) == {1}


def test_a_short_transfer_goes_on_within_its_parts(tmp_path: Path) -> None:
    """Each call moves one page."""
    page, data = 4096, pattern(6 * 4096)
    (tmp_path / "f").write_bytes(bytes(data.numpy()))
    target = buffer_of(6 * page).numpy().data
    parts = [target[3 * page :], target[: 2 * page], target[2 * page : 3 * page]]
    calls: list[tuple[int, int]] = []

    def short(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        calls.append((len(views), offset))
        return os.preadv(descriptor, [views[0][:page]], offset)

    with open(tmp_path / "f", "rb") as opened:
        _transfer(DirectFile(tmp_path / "f", opened.fileno(), direct=True), 0, parts, short)
    assert calls == [(3, 0), (3, page), (3, 2 * page), (2, 3 * page), (2, 4 * page), (1, 5 * page)]
    assert b"".join(parts) == bytes(data.numpy())


def test_short_file_is_an_error_with_its_offset(folder: Path, backend: StorageBackend) -> None:
    file = backend.open(folder / "f", writable=True)
    backend.write(file, 0, pattern(1 << 20))
    os.truncate(folder / "f", 300_000)
    with pytest.raises(StorageError) as caught:
        backend.submit(file, 0, buffer_of(1 << 20)).result()
    assert caught.value.path == str(folder / "f")
    assert 294_912 <= caught.value.offset <= 1 << 20
    whole = buffer_of(294_912)
    backend.read(file, 0, whole)
    file.close()


def test_failed_calls_are_typed_errors(tmp_path: Path, backend: StorageBackend) -> None:
    (tmp_path / "f").write_bytes(bytes(8192))
    file = backend.open(tmp_path / "f")
    with pytest.raises(StorageError, match="Bad file descriptor"):
        backend.write(file, 0, buffer_of(4096))
    file.close()
    with pytest.raises(StorageError, match="Bad file descriptor"):
        backend.read(file, 0, buffer_of(4096))
    with pytest.raises(FileNotFoundError):
        backend.open(tmp_path / "none")


@pytest.mark.parametrize(("offset", "begin", "size"), [(1, 0, 4096), (0, 0, 100), (0, 64, 4096)])
def test_unaligned_transfers_are_refused(
    offset: int, begin: int, size: int, tmp_path: Path, backend: StorageBackend
) -> None:
    (tmp_path / "f").write_bytes(bytes(16384))
    file = backend.open(tmp_path / "f")
    with pytest.raises(ValueError, match="4096"):
        backend.read(file, offset, buffer_of(16384)[begin : begin + size])
    file.close()


def test_unbuilt_deepnvme_says_how_to_build_it() -> None:
    try:
        backend = BACKENDS["deepnvme"]()
    except BackendUnavailableError as error:
        assert "DS_BUILD_AIO=1" in str(error) and "posix" in str(error)
    else:
        backend.close()


def test_file_system_without_direct_access_is_read_through_the_cache(
    tmp_path: Path, backend: StorageBackend
) -> None:
    refused = backend.open(Path("/proc/self/status"))  # procfs answers O_DIRECT with EINVAL
    assert not refused.direct
    refused.close()
    file = DirectFile(tmp_path / "f", os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT), direct=False)
    data, target = pattern(300 << 10), buffer_of(300 << 10)
    backend.write(file, 4096, data)
    backend.submit(file, 4096, target).result()
    assert torch.equal(target, data)
    os.truncate(tmp_path / "f", 10_000)
    with pytest.raises(StorageError, match="ends here") as caught:
        backend.read(file, 0, target)
    assert caught.value.offset == 10_000
    file.close()
