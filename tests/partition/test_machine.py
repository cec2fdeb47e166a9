from __future__ import annotations

from pathlib import Path

import pytest

from giantserve.calibrate import calibrate
from giantserve.probes.gemm import ROWS
from partition.errors import PlanError
from partition.machine import Machine, available_memory_bytes


def fake_root(folder: Path, cgroup: str, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8192 kB\n", **files}
    for name, text in {**files, "proc/self/cgroup": cgroup}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_memory_without_limits_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert available_memory_bytes(fake_root(tmp_path, "0::/\n", {})) == 8192 * 1024


def test_memory_under_a_cgroup_v2_limit_counts_droppable_cache_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a"
    files = {
        f"{group}/memory.max": "1000000\n",
        f"{group}/memory.current": "600000\n",
        f"{group}/memory.stat": "anon 1\ninactive_file 100000\n",
        f"{group}/b/memory.max": "max\n",
    }
    assert available_memory_bytes(fake_root(tmp_path, "0::/a/b\n", files)) == 500000


def test_memory_under_a_cgroup_v1_limit_seen_from_inside_a_container(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    files = {
        f"{group}/memory.limit_in_bytes": "1000000\n",
        f"{group}/memory.usage_in_bytes": "600000\n",
        f"{group}/memory.stat": "total_inactive_file 0\n",
    }
    root = fake_root(tmp_path, "4:memory:/docker/abc\n1:cpu:/\n", files)
    assert available_memory_bytes(root) == 400000


def test_this_machine_has_something(tmp_path: Path) -> None:
    machine = Machine.discover(tmp_path / "not" / "yet")
    assert machine.memory_bytes > 0
    assert machine.free_disk_bytes > 0
    assert machine.num_cpus >= 1


def test_calibration_is_measured_cached_and_leaves_nothing(tmp_path: Path) -> None:
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    disk.mkdir()
    (disk / "below").mkdir()
    first = calibrate(disk, dtype="float32", cache_folder=cache)
    assert [rate.rows for rate in first.bandwidths.gemm] == list(ROWS)
    assert first.storage_backend in first.storage and "posix" in first.storage
    assert all(1e6 < rate < 1e12 for rate in first.storage.values())
    assert first.bandwidths.streamed_gemm == ()  # only bf16 has a layout of its own
    assert list(disk.iterdir()) == [disk / "below"]
    (file,) = cache.iterdir()
    assert calibrate(disk / "below", dtype="float32", cache_folder=cache) == first
    file.write_text("{")
    again = calibrate(disk, dtype="float32", cache_folder=cache)
    assert again.bandwidths != first.bandwidths
    assert calibrate(disk, dtype="float32", cache_folder=cache) == again
    third = calibrate(disk, dtype="float32", refresh=True, cache_folder=cache)
    assert third.bandwidths != again.bandwidths


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="name a folder"):
        calibrate(tmp_path / "absent", cache_folder=tmp_path)
