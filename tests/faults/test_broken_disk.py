"""NVMe folders that cannot be used, and stores damaged after they were packed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from giantserve import LLM
from giantserve.errors import GiantserveError
from giantserve.executor.launcher import Launcher
from kvcache.errors import TierError
from partition.errors import PlanError
from tests.faults.conftest import Opener, tokens

Refusal = (GiantserveError, PlanError, TierError)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "tiny-disk"
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    tiny_disk: Path, pristine: Path, open_llm: Opener, expected: list[list[int]], nvme_dir: Path
) -> None:
    with pytest.raises(Refusal, match=r"nvme_dir|written|space"):
        open_llm(pristine, tiny_disk).close()
    left = [path for path in tiny_disk.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    assert not left, "the failed pack keeps the disk full"
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected


def test_a_folder_open_to_others_is_refused(
    pristine: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    (nvme_dir / "weights").mkdir(mode=0o755)
    with pytest.raises(Refusal, match=r"open to other users .*chmod 700"):
        open_llm(pristine, nvme_dir).close()
    (nvme_dir / "weights").chmod(0o700)
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected


def test_a_folder_of_another_user_is_refused(
    pristine: Path, nvme_dir: Path, open_llm: Opener
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    (nvme_dir / "weights").mkdir(mode=0o700)
    os.chown(nvme_dir / "weights", 12345, 12345)
    with pytest.raises(Refusal, match="belongs to another user"):
        open_llm(pristine, nvme_dir).close()


def test_a_folder_that_cannot_be_made(pristine: Path, tmp_path: Path, launcher: Launcher) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GiantserveError, match="cannot be made"):
        LLM(pristine, nvme_dir=tmp_path / "file" / "nvme", launcher=launcher).close()
    with pytest.raises(GiantserveError, match="nvme_dir"):
        LLM(pristine, nvme_dir=tmp_path / "file", launcher=launcher).close()


def test_a_folder_that_cannot_be_written(pristine: Path, tmp_path: Path) -> None:
    """As another user, since root may write anywhere."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    folder = Path("/proc/sys/kernel")  # not even root makes files here
    with pytest.raises(Refusal, match=r"nvme_dir|cannot measure"):
        LLM(pristine, nvme_dir=folder).close()


def only_store(nvme_dir: Path) -> Path:
    (store,) = (nvme_dir / "weights").glob("*.weights")
    return store


def test_a_truncated_store_is_packed_again(
    pristine: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected
    store = only_store(nvme_dir)
    size, packed = store.stat().st_size, store.stat().st_mtime_ns
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected
    assert store.stat().st_mtime_ns == packed, "an intact store is reused"
    os.truncate(store, size // 2)
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected
    assert store.stat().st_size == size and store.stat().st_mtime_ns != packed


@pytest.mark.parametrize("place", [0.01, 0.3, 0.6, 0.95])
def test_a_flipped_bit_is_never_a_wrong_token(
    place: float, pristine: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected
    store = only_store(nvme_dir)
    before = store.read_bytes()
    data = bytearray(before)
    data[int(len(data) * place)] ^= 0x40
    store.write_bytes(data)
    assert store.read_bytes() != before
    with pytest.raises(Refusal, match="fails its checksum"), open_llm(pristine, nvme_dir) as llm:
        tokens(llm)
    store.unlink()  # what the message says
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 99}', "\x00\x00"])
def test_a_damaged_index_is_packed_again(
    damage: str, pristine: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected
    (index,) = (nvme_dir / "weights").glob("*.json")
    good = index.read_text()
    index.write_text(damage)
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected
    assert index.read_text() == good


def test_killed_while_packing(
    pristine: Path, nvme_dir: Path, open_llm: Opener, expected: list[list[int]]
) -> None:
    seen: list[set[str]] = []

    def kill(rank: int, progress: object) -> None:
        if not seen:
            seen.append({path.suffix for path in (nvme_dir / "weights").iterdir()})
            workers = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
            os.kill(max(p.pid for p in workers), signal.SIGKILL)

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(GiantserveError, match="signal 9"):
        open_llm(pristine, nvme_dir, on_progress=kill)
    assert seen
    with open_llm(pristine, nvme_dir) as llm:
        assert tokens(llm) == expected
    assert not list((nvme_dir / "weights").glob("*.partial"))
    assert not list((nvme_dir / "weights").glob("*.journal"))
