"""A disk that holds a model's store once, and not another time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from giantserve.stored_files import stored_bytes
from partition.errors import PlanError
from tests.exactness.zoo import reference, save_twelve_layers
from tests.faults.loop_disk import mounted_disk

PROMPT = [3, 14, 15, 92, 65]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
DISK_BYTES = 40 << 20


def test_what_a_model_has_stored_there_does_not_count_as_taken(
    tmp_path: Path, launcher: Launcher
) -> None:
    path = save_twelve_layers(tmp_path / "model")
    other = Path(shutil.copytree(path, tmp_path / "other"))
    options = {"device_memory": 6 << 20, "host_memory": 0, "max_model_len": 64, "max_num_seqs": 2}
    with mounted_disk(tmp_path, DISK_BYTES) as disk:
        nvme_dir = disk.folder / "nvme"
        for _ in range(2):
            with LLM(path, nvme_dir=nvme_dir, launcher=launcher, **options) as llm:
                (output,) = llm.generate([PROMPT], GREEDY)
                assert [list(output.token_ids)] == reference(path, [PROMPT], 4)
            free = shutil.disk_usage(nvme_dir).free
            assert stored_bytes(nvme_dir, path) > free, "it would find room for another"
        assert stored_bytes(nvme_dir, other) == 0
        with pytest.raises(PlanError, match="nvme_dir"):
            LLM(other, nvme_dir=nvme_dir, launcher=launcher, **options).close()
