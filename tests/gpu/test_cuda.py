"""The same promises on a CUDA device: the arena's bytes, and the tokens from every tier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from giantserve import LLM, SamplingParams
from giantserve.executor.launcher import Launcher
from kvcache.arena import Arena
from kvcache.errors import TierFullError
from kvcache.tier import Tier
from tests.exactness.plans import make_plan
from tests.exactness.zoo import make_prompts, reference, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NUM_TOKENS = 32
PROMPTS = make_prompts((3, 17, 40, 9))
STAGING_BYTES = 64 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("tiers", ["device", "host", "nvme", "mixed"])
def test_same_tokens_from_every_tier(tiers: str, model: Path, launcher: Launcher) -> None:
    plan = make_plan(model, 1, 1, tiers, device_blocks=64, host_blocks=64)
    stages = tuple(
        replace(
            stage,
            shards=tuple(replace(shard, staging_bytes=STAGING_BYTES) for shard in stage.shards),
        )
        for stage in plan.stages
    )
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(
        model,
        plan=replace(plan, stages=stages),
        device="cuda",
        nvme_dir=model / "nvme",
        launcher=launcher,
    ) as llm:
        outputs = llm.generate(PROMPTS, params)
        links = llm.stats()["shards"][0]["links"]
    assert [o.token_ids for o in outputs] == reference(model, PROMPTS, NUM_TOKENS)
    if tiers in ("host", "nvme"):
        assert sum(link["bytes"] for link in links if link["source"] == tiers) > 0


def test_the_device_arena_holds_cuda_memory_and_its_cap() -> None:
    device = torch.device("cuda:0")
    arena = Arena(Tier.DEVICE, 8 << 20, device)
    before = torch.cuda.memory_allocated(device)
    buffer = arena.allocate(5 << 20)
    assert buffer.device == device
    assert torch.cuda.memory_allocated(device) - before >= 5 << 20
    with pytest.raises(TierFullError):
        arena.allocate(4 << 20)
    buffer.fill_(7)
    assert int(buffer.sum(dtype=torch.int64)) == 7 * (5 << 20)
    arena.release(buffer)
    del buffer
    assert torch.cuda.memory_allocated(device) == before
    arena.check_integrity()


def test_the_host_arena_is_page_locked() -> None:
    arena = Arena(Tier.HOST, 1 << 20)
    buffer = arena.allocate(1 << 20)
    assert buffer.is_pinned()
    arena.close()
