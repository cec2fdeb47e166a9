"""The process that forks workers: what it runs, what it ends, and what happens when it goes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import psutil
import pytest

from giantserve.errors import ConfigError, EngineDeadError
from giantserve.executor.launcher import (
    ENVIRONMENT_NAME,
    Launcher,
    node_launcher,
    remove_dead,
    run_beside,
)
from giantserve.executor.launcher_process import run_to_its_end
from giantserve.units import parse_bytes

AUTHKEY = b"of this test"
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a launcher listens for the tests of this module."""
    path = tmp_path_factory.mktemp("launcher") / "socket"
    running = Launcher(listen=path)
    yield path
    running.close()


@pytest.fixture
def of_node(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_NAME, str(socket_path))


def ended(pid: int) -> bool:
    give_up_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up_s:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def ending(launcher: Launcher, pid: int) -> str | None:
    """How a worker ended: known once its last thread has, some time after the kill."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while (status := launcher.exit_status(pid)) is None and time.monotonic() < give_up_s:
        time.sleep(0.01)
    return status


def launched(launcher: Launcher, listener: Listener) -> tuple[int, Connection]:
    """A worker that waits for its setup on the connection."""
    pid = launcher.launch(listener.address, AUTHKEY, 0)  # type: ignore[arg-type]
    connection = listener.accept()
    assert connection.recv().pid == pid
    return pid, connection


def test_a_function_runs_in_another_process_with_torch_at_hand(of_node: None) -> None:
    assert run_beside(os.getpid) not in (os.getpid(), os.getppid())
    assert run_beside(eval, "'torch' in __import__('sys').modules") is True
    assert run_beside(int, "ff", base=16) == 255


def test_what_it_raises_is_raised_here(of_node: None) -> None:
    with pytest.raises(ConfigError, match="7 apples"):
        run_beside(parse_bytes, "7 apples")
    with pytest.raises(EngineDeadError, match="died"):
        run_beside(os._exit, 3)
    for answer in ("lambda: None", "__import__('threading').Lock()"):
        with pytest.raises(pickle.PicklingError, match="the answer does not pickle"):
            run_beside(eval, answer)
    assert run_beside(abs, -1) == 1, "it goes on"


def test_without_a_launcher_it_runs_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(ENVIRONMENT_NAME, raising=False)
    assert run_beside(os.getpid) == os.getpid() and node_launcher() is None
    monkeypatch.setenv(ENVIRONMENT_NAME, str(tmp_path / "gone"))
    assert run_beside(os.getpid) == os.getpid()
    assert "no launcher at" in caplog.text


def test_a_client_that_goes_takes_its_workers_along_and_no_others(socket_path: Path) -> None:
    with Listener(("127.0.0.1", 0), authkey=AUTHKEY) as listener:
        one, other = Launcher.connect(socket_path), Launcher.connect(socket_path)
        (mine, kept), (theirs, also_kept) = launched(one, listener), launched(other, listener)
        assert one.exit_status(mine) is None and other.exit_status(theirs) is None
        one.close()
        assert ended(mine)
        assert other.exit_status(theirs) is None
        other.kill(theirs)
        assert ending(other, theirs) == "signal 9"
        assert ended(theirs)
        other.close()
        kept.close()
        also_kept.close()


def test_a_worker_that_cannot_connect_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(Launcher()) as launcher:
        pid = launcher.launch(("127.0.0.1", 1), AUTHKEY, 0)
        assert ending(launcher, pid) == "status 1"
    said = capfd.readouterr().err
    assert said.startswith("Traceback") and "ConnectionRefusedError" in said


PARENT = """
import sys, time
from multiprocessing.connection import Listener
from pathlib import Path
from giantserve.executor.launcher import Launcher
launcher = Launcher(listen=Path(sys.argv[1]))
with Listener(("127.0.0.1", 0), authkey=b"key") as listener:
    pid = launcher.launch(listener.address, b"key", 0)
    accepted = listener.accept()
    print(pid, launcher._process.pid, flush=True)
    time.sleep(600)
"""


def test_it_dies_with_its_parent_and_its_workers_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "socket")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()
    assert all(ended(pid) for pid in pids)


def test_asking_a_launcher_that_was_killed(tmp_path: Path) -> None:
    launcher = Launcher(listen=tmp_path / "socket")
    assert launcher.run(abs, -2) == 2
    assert launcher._process is not None
    launcher._process.kill()
    with pytest.raises(EngineDeadError, match="starts the workers has ended"):
        launcher.run(abs, -2)
    launcher.close()


def test_sockets_that_nobody_listens_to_are_removed(socket_path: Path, tmp_path: Path) -> None:
    """Not one that was just bound, nor what is no socket or lives."""
    hour_ago = time.time() - 3600
    dead, new, file = (tmp_path / name / "launcher" for name in ("dead", "new", "file"))
    for path in (dead, new):
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    file.parent.mkdir()
    file.write_text("precious")
    for path in (dead, file, socket_path):
        os.utime(path, (hour_ago, hour_ago))
    remove_dead([dead, new, file, socket_path, tmp_path / "none" / "launcher"])
    assert not dead.parent.exists()
    assert new.exists() and file.exists()
    with contextlib.closing(Launcher.connect(socket_path)) as living:
        assert living.run(int, "7") == 7


def test_a_fork_finds_no_thread_on_its_way_out() -> None:
    """At its end this one calls a destructor that sleeps, as MKL's may wait for the CPU."""
    libc = ctypes.CDLL(None)
    key = ctypes.c_uint()
    assert libc.pthread_key_create(ctypes.byref(key), libc.usleep) == 0
    tasks: list[Path] = []

    def body() -> None:
        tasks.append(Path(f"/proc/self/task/{threading.get_native_id()}"))
        assert libc.pthread_setspecific(key, ctypes.c_void_p(200_000)) == 0

    joined = threading.Thread(target=body)
    joined.start()
    joined.join()
    assert tasks[0].exists(), "the destructor was not called"
    run_to_its_end(body)
    assert not tasks[1].exists()
    while tasks[0].exists():
        time.sleep(0.01)
    assert libc.pthread_key_delete(key) == 0
