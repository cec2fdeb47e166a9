"""Measure this machine once and keep what was found."""

from __future__ import annotations

import datetime
from pathlib import Path

from kvcache.errors import StorageError
from partition.bandwidths import Bandwidths
from partition.cache import store
from partition.calibration import Calibration, cache_path, load, machine_name
from partition.disk_probe import probe_disk
from partition.errors import PlanError


def calibrate(
    folder: Path,
    device: str = "cpu",
    dtype: str = "bfloat16",
    *,
    refresh: bool = False,
    cache_folder: Path | None = None,
) -> Calibration:
    """Bandwidths of this machine, from the cache unless ``refresh``; else measured in about 20 s.

    ``folder`` is where weights would lie on NVMe; it must exist and be writable (PlanError if not).
    What is cached holds for every folder of the same file system.
    """
    path = cache_path(cache_folder, folder, device, dtype)
    cached = None if refresh else load(path)
    if cached is not None:
        return cached
    measured = _measure(folder, device, dtype)
    store(path, measured)
    return measured


def _measure(folder: Path, device: str, dtype: str) -> Calibration:
    from giantserve.probes.gemm import probe_gemm
    from giantserve.probes.kv_codec import probe_kv_codecs
    from giantserve.probes.link import probe_link
    from giantserve.probes.memory import probe_memory
    from giantserve.probes.runtime import probe_runtime
    from giantserve.probes.storage import probe_backends

    try:
        disk = probe_disk(folder)
        storage = probe_backends(folder)
    except (OSError, StorageError) as error:
        raise PlanError(
            f"cannot measure the disk of {folder}: {error}; name a folder that can be written"
        ) from None
    memory = probe_memory(device)
    on_cuda = device.startswith("cuda")
    gemm, streamed_gemm = probe_gemm(device, dtype)
    return Calibration(
        machine=machine_name(),
        folder=str(folder.resolve()),
        device=device,
        dtype=dtype,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        direct_io=disk.direct,
        storage=storage,
        bandwidths=Bandwidths(
            device_memory=memory.read,
            host_to_device=memory.to_device,
            device_to_host=memory.to_host,
            disk_read=disk.read,
            disk_write=disk.write,
            gemm=gemm,
            streamed_gemm=streamed_gemm,
            disk_blocks=disk.blocks,
            kv_codecs=probe_kv_codecs(device, dtype),
            copies_overlap=on_cuda,
            host_attention=probe_runtime("cpu", dtype).attention if on_cuda else None,
            runtime=probe_runtime(device, dtype),
        ),
        link=probe_link(device),
    )
