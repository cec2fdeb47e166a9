"""A tier that was asked for is used, or an error says that it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from giantserve import LLM
from giantserve.config import EngineConfig
from giantserve.errors import ConfigError, EngineDeadError
from giantserve.executor.launcher import Launcher
from giantserve.tier_check import check_asked, check_held, used_tiers
from kvcache.tier import Tier
from partition.plan import PartitionPlan
from tests.exactness.plans import make_plan


@pytest.fixture(scope="module")
def resident(model_path: Path) -> PartitionPlan:
    return make_plan(model_path, 1, 1, "device", device_blocks=8, host_blocks=0)


@pytest.fixture(scope="module")
def mixed(model_path: Path) -> PartitionPlan:
    return make_plan(model_path, 1, 1, "mixed", device_blocks=8, host_blocks=4)


def config(**options: Any) -> EngineConfig:
    return EngineConfig(model="m", **options)


@pytest.mark.parametrize(
    ("asked", "tier"),
    [
        ({"host_memory": 1 << 20}, "host"),
        ({"nvme_dir": Path("/x")}, "nvme"),
        ({"nvme_memory": 1 << 20}, "nvme"),
    ],
)
def test_an_unused_tier_is_an_error(
    asked: dict[str, Any], tier: str, resident: PartitionPlan, mixed: PartitionPlan
) -> None:
    (name,) = asked
    says = f"{name} .*nothing would lie on the {tier} tier.*{name} out"
    with pytest.raises(ConfigError, match=says):
        check_asked(config(**asked), resident)
    check_asked(config(**asked), mixed)
    check_asked(config(**asked, allow_unused_tiers=True), resident)


def test_what_was_not_asked_for_may_lie_idle(resident: PartitionPlan) -> None:
    check_asked(config(), resident)
    check_asked(config(host_memory=0, nvme_memory=0), resident)


def test_it_is_said_before_anything_is_loaded(
    model_path: Path, nvme_dir: Path, launcher: Launcher
) -> None:
    started: list[object] = []
    with pytest.raises(ConfigError, match=f"nvme_dir {nvme_dir} was asked for"):
        LLM(
            model_path,
            nvme_dir=nvme_dir,
            device_memory="64MiB",
            max_num_seqs=2,
            launcher=launcher,
            on_progress=lambda rank, progress: started.append(rank),
        )
    assert not started


def test_what_the_shards_hold_is_what_was_planned(
    mixed: PartitionPlan,
    model_path: Path,
    nvme_dir: Path,
    launcher: Launcher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert used_tiers(mixed) == set(Tier)
    caplog.set_level("INFO", "giantserve")
    with LLM(model_path, nvme_dir=nvme_dir, plan=mixed, launcher=launcher):
        pass
    (said,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("loaded: "))
    assert " 0 B" not in said
    for tier in Tier:
        check_held(mixed, dict.fromkeys(Tier, 1))
        with pytest.raises(EngineDeadError, match=f"the {tier.value} tier, but the shards"):
            check_held(mixed, {**dict.fromkeys(Tier, 1), tier: 0})
