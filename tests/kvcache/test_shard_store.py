"""The store on disk: packing, resuming after a kill, corruption, rights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvcache import shard_store
from kvcache.arena import Arena
from kvcache.errors import CorruptUnitError, StoreError
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier

UNITS = [("a", 8192), ("b", 4096), ("c", 65536), ("d", 4096)]
MAX_BYTES = 65536


def buffer_of(num_bytes: int) -> torch.Tensor:
    return Arena(Tier.HOST, num_bytes).allocate(num_bytes)


def fill(name: str, buffer: torch.Tensor) -> None:
    buffer.copy_((torch.arange(buffer.numel()) * (ord(name[0]) + 3) % 251).to(torch.uint8))


def content(name: str, num_bytes: int) -> torch.Tensor:
    buffer = buffer_of(num_bytes)
    fill(name, buffer)
    return buffer


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Callable[..., ShardStore]]:
    opened: list[ShardStore] = []

    def make(key: str = "key", **options: bool) -> ShardStore:
        opened.append(ShardStore(tmp_path / "weights", key, **options))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
        store.close()


def pack(store: ShardStore, units: list[tuple[str, int]] = UNITS) -> tuple[bool, list[str]]:
    filled: list[str] = []

    def recording(name: str, buffer: torch.Tensor) -> None:
        filled.append(name)
        fill(name, buffer)

    return store.open_or_pack(units, recording, lambda: buffer_of(MAX_BYTES)), filled


def assert_content(store: ShardStore) -> None:
    for name, num_bytes in UNITS:
        buffer = buffer_of(num_bytes)
        store.submit(name, buffer).result()
        store.check_first_read(name, buffer)
        assert torch.equal(buffer, content(name, num_bytes))
    store.verify(buffer_of(8192))


def test_packs_once_and_reuses(stores: Callable[..., ShardStore], tmp_path: Path) -> None:
    seen: list[int] = []
    first = stores()
    assert first.open_or_pack(UNITS, fill, lambda: buffer_of(MAX_BYTES), seen.append)
    assert seen == [8192, 4096, 65536, 4096]
    assert_content(first)
    first.close()
    again = stores()
    assert pack(again) == (False, [])
    assert_content(again)
    files = list((tmp_path / "weights").iterdir())
    assert sorted(file.suffix for file in files) == [".json", ".lock", ".weights"]
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o700


def test_keys_lie_side_by_side(stores: Callable[..., ShardStore]) -> None:
    one, two = stores("m/tp0of2 layers 0-3"), stores("m/tp1of2 layers 0-3")
    assert pack(one)[0] and pack(two)[0]
    assert one.path != two.path


@pytest.mark.parametrize("damage", ["garbage", "missing", "other key", "other version", "short"])
def test_unusable_index_or_file_is_packed_again(
    damage: str, stores: Callable[..., ShardStore]
) -> None:
    store = stores()
    pack(store)
    store.close()
    index = store.path.with_suffix(".json")
    data = json.loads(index.read_text())
    if damage == "garbage":
        index.write_bytes(b"\xff{")
    elif damage == "missing":
        index.unlink()
    elif damage == "other key":
        index.write_text(json.dumps({**data, "key": "another"}))
    elif damage == "other version":
        index.write_text(json.dumps({**data, "version": 0}))
    else:
        os.truncate(store.path, 4096)
    again = stores()
    assert pack(again) == (True, ["a", "b", "c", "d"])
    assert_content(again)


def test_other_units_are_packed_again(stores: Callable[..., ShardStore]) -> None:
    store = stores()
    pack(store)
    store.close()
    assert pack(stores(), UNITS[:2]) == (True, ["a", "b"])


def test_flipped_bit_is_found_and_named(stores: Callable[..., ShardStore]) -> None:
    store = stores()
    pack(store)
    store.close()
    with store.path.open("r+b") as file:
        file.seek(8192 + 100)
        byte = file.read(1)[0]
        file.seek(8192 + 100)
        file.write(bytes([byte ^ 4]))
    again, trusting = stores(), stores(verify_first_read=False)
    for opened in (again, trusting):
        assert pack(opened) == (False, [])
        buffer = buffer_of(4096)
        opened.submit("b", buffer).result()
        assert (buffer != content("b", 4096)).sum() == 1
        if opened is trusting:
            opened.check_first_read("b", buffer)
        else:
            with pytest.raises(CorruptUnitError, match=r"unit b in .*; delete"):
                opened.check_first_read("b", buffer)
        with pytest.raises(CorruptUnitError, match="unit b"):
            opened.verify(buffer_of(4096))
        opened.verify(buffer_of(4096), ["a", "c", "d"])


def test_pack_that_fails_is_resumed(stores: Callable[..., ShardStore]) -> None:
    def failing(name: str, buffer: torch.Tensor) -> None:
        if name == "c":
            raise RuntimeError("the checkpoint went away")
        fill(name, buffer)

    store = stores()
    with pytest.raises(RuntimeError, match="went away"):
        store.open_or_pack(UNITS, failing, lambda: buffer_of(MAX_BYTES))
    store.close()
    assert not store.path.exists()
    again = stores()
    assert pack(again) == (True, ["c", "d"])
    assert_content(again)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_shard_store import MAX_BYTES, UNITS, ShardStore, buffer_of, fill

def dying(name, buffer):
    if name == "c":
        os.kill(os.getpid(), signal.SIGKILL)
    fill(name, buffer)

ShardStore(Path({folder!r}), "key").open_or_pack(UNITS, dying, lambda: buffer_of(MAX_BYTES))
"""


def test_killed_pack_is_resumed(stores: Callable[..., ShardStore], tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = KILLED.format(
        root=str(here.parent.parent), tests=str(here), folder=str(tmp_path / "weights")
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    journal = next((tmp_path / "weights").glob("*.journal"))
    with journal.open("a") as file:
        file.write('{"name": "c", "offset": 12')  # a line that the kill cut
    again = stores()
    assert pack(again) == (True, ["c", "d"])
    assert_content(again)
    assert not journal.exists()


WAITING = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_shard_store import MAX_BYTES, UNITS, ShardStore, buffer_of, fill

def hanging(name, buffer):
    if name == "c":
        print("hangs", flush=True)
        time.sleep(600)
    fill(name, buffer)

ShardStore(Path({folder!r}), "key").open_or_pack(UNITS, hanging, lambda: buffer_of(MAX_BYTES))
"""


def test_who_waits_goes_on_where_a_killed_pack_stopped(
    stores: Callable[..., ShardStore], tmp_path: Path
) -> None:
    here = Path(__file__).parent
    folder = str(tmp_path / "weights")
    code = WAITING.format(root=str(here.parent.parent), tests=str(here), folder=folder)
    waiting = [stores(), stores()]
    with (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as packer,
        ThreadPoolExecutor(2) as beside,
    ):
        assert packer.stdout is not None and packer.stdout.readline() == b"hangs\n"
        packs = [beside.submit(pack, store) for store in waiting]
        with pytest.raises(TimeoutError):
            packs[0].result(timeout=0.3)
        packer.kill()
        results = [each.result(timeout=60) for each in packs]
    assert sorted(results) == [(False, []), (True, ["c", "d"])]
    for store in waiting:
        assert_content(store)


def test_a_store_in_use_without_its_index_is_refused(
    stores: Callable[..., ShardStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_store, "RETRY_PERIOD_S", 0.001)
    pack(stores())
    next((tmp_path / "weights").glob("*.json")).unlink()
    with pytest.raises(StoreError, match="its index is gone"):
        pack(stores())


def test_store_in_use_is_not_overwritten(stores: Callable[..., ShardStore]) -> None:
    reader, second, writer = stores(), stores(), stores()
    pack(reader)
    assert pack(second) == (False, [])
    with pytest.raises(StoreError, match="in use by another process"):
        pack(writer, UNITS[:1])
    assert_content(reader)


def test_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir(mode=0o700)
    folder.chmod(0o750)
    with pytest.raises(StoreError, match=r"mode 750\); run: chmod 700"):
        ShardStore(folder, "key")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        ShardStore(tmp_path / "file" / "under", "key")
    with pytest.raises(ValueError, match="nothing"):
        ShardStore(tmp_path / "w", "key", backend="nothing")


def test_space_that_does_not_exist_is_refused_at_once(stores: Callable[..., ShardStore]) -> None:
    with pytest.raises(Exception, match="nvme_dir"):
        pack(stores(), [("huge", 1 << 56)])
