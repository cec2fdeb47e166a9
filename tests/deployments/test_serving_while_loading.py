"""A real server whose checkpoint lies on a disk that takes its time."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import transformers
from server import START_TIMEOUT_S, Server, wait_until
from zoo import reference, save_twelve_layers

from giantserve.demo_tokenizer import train_tokenizer
from tests.faults.loop_disk import mounted_disk

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from throttle import Throttle

LOAD_S = 60.0
"""Longer than a server takes to start on a busy machine: the disk is slow until a test lets go."""
DISK_BYTES = 128 << 20

PROMPT = [3, 14, 15, 92, 65]
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """25 MiB in 12 layers, on a disk of its own: what else a server reads is not slow."""
    with mounted_disk(tmp_path_factory.mktemp("slow"), DISK_BYTES) as disk:
        path = save_twelve_layers(disk.folder / "model", vocab_size=512)
        train_tokenizer(path, 512)
        yield path


@pytest.fixture(scope="module")
def expected(model: Path) -> str:
    """What transformers makes of the prompt, as text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    (tokens,) = reference(model, [PROMPT], NUM_TOKENS)
    text: str = tokenizer.decode(tokens, skip_special_tokens=False)
    return text


@dataclass(frozen=True, slots=True)
class SlowServer:
    """A server that is ready while its weights load, until ``disk`` is closed."""

    server: Server
    disk: Throttle

    def says_loaded(self) -> bool:
        """Waits for it. Ray may say more on stdout."""
        assert self.server.process.stdout is not None
        return any(line.startswith("loaded after ") for line in self.server.process.stdout)


@pytest.fixture
def slow(model: Path, expected: str, tmp_path: Path) -> Iterator[SlowServer]:
    """Skips, with the reason, where disks cannot be throttled."""
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    with weights.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rate = len(content) / LOAD_S
    before = {process.pid for process in psutil.process_iter()}
    throttles: list[Throttle | OSError] = []

    def slow_down() -> None:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_s and not throttles:
            for process in psutil.process_iter():
                if process.pid not in before and is_launcher(process):
                    try:
                        throttles.append(Throttle("serve", process.pid, model, rate))
                    except OSError as error:
                        throttles.append(error)
            time.sleep(0.01)

    watcher = threading.Thread(target=slow_down)
    watcher.start()
    server = Server(model, tmp_path, "device_memory=64MiB")
    watcher.join()
    (disk,) = throttles
    try:
        if isinstance(disk, OSError):
            pytest.skip(f"disks cannot be throttled here: {disk}")
        with disk:
            yield SlowServer(server, disk)
    finally:
        if server.process.poll() is None:
            server.stop()
        weights.write_bytes(content)


def is_launcher(process: psutil.Process) -> bool:
    try:
        return "giantserve.executor.launcher_process" in process.cmdline()
    except psutil.Error:
        return False


def test_it_answers_while_the_weights_load(slow: SlowServer, expected: str) -> None:
    with ThreadPoolExecutor(2) as beside:
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "skip_special_tokens": False}
        answer = beside.submit(slow.server.complete, **body)
        says_loaded = beside.submit(slow.says_loaded)
        wait_until("the request runs", lambda: slow.server.stats()["running"] == 1)
        assert not answer.done() and not says_loaded.done(), "the disk was not slow"
        slow.disk.close()
        assert answer.result().status_code == 200
        assert answer.result().json()["choices"][0]["text"] == expected
        assert says_loaded.result()


def test_a_replica_that_dies_while_it_loads_is_replaced(slow: SlowServer, expected: str) -> None:
    (replica,) = [p for p in slow.server.processes() if "ServeReplica" in p.name()]
    replica.kill()
    slow.disk.close()
    assert slow.says_loaded()
    answer = slow.server.complete(prompt=PROMPT, max_tokens=NUM_TOKENS, skip_special_tokens=False)
    assert answer.json()["choices"][0]["text"] == expected


def test_a_load_that_fails_ends_the_server_with_its_reason(slow: SlowServer, model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    slow.disk.close()
    assert slow.server.process.wait(START_TIMEOUT_S) == 1
    last = slow.server.stderr_path.read_text().splitlines()[-1]
    assert last.startswith("error: ") and "was cut since it was opened" in last
