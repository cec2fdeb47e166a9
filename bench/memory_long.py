"""2,000 mixed requests through tiny tiers."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from report import header
from shapes import write_checkpoint

from giantserve import SamplingParams
from giantserve.async_engine import AsyncEngine
from giantserve.config import EngineConfig
from giantserve.planning import resolve
from kvcache.tier import Tier
from partition import PartitionPlan

LONG_REQUESTS, LONG_TOKENS, LONG_SPREAD_S = 2000, 24, 5.0


def long_plan(path: Path, nvme_dir: Path) -> PartitionPlan:
    """Two stages, every other unit on NVMe, KV for a few sequences on the device, few demoted
    blocks, and rotating blocks on host and NVMe."""
    config = EngineConfig(
        model=str(path),
        nvme_dir=nvme_dir,
        device_memory=1 << 28,
        host_memory=1 << 28,
        tensor_parallel=1,
        pipeline_parallel=2,
        block_size=4,
        max_model_len=128,
        max_num_seqs=12,
        max_num_batched_tokens=64,
    )
    plan = resolve(config).plan
    stages = []
    for stage in plan.stages:
        (shard,) = stage.shards
        large = [p.unit for p in shard.placements if p.unit.endswith((".attention", ".mlp"))]
        placements = tuple(
            replace(p, tier=Tier.NVME) if p.unit in large[::2] else p for p in shard.placements
        )
        ring = 2 * max(p.num_bytes for p in placements)
        budget = replace(shard.budget, device_bytes=1 << 30, host_bytes=1 << 30)
        shard = replace(shard, placements=placements, ring_bytes=ring, budget=budget)
        stages.append(replace(stage, shards=(shard,)))
    return replace(
        plan,
        stages=tuple(stages),
        passes_in_flight=1,
        num_device_blocks=24,
        num_host_blocks=24,
        num_rotating_host_blocks=30,
        num_rotating_nvme_blocks=40,
        num_rotation_slots=45,
        num_tail_blocks=6,
    )


@dataclass(frozen=True, slots=True)
class Held:
    """What the engine's processes hold: memory, descriptors, and files below the NVMe folder."""

    rss_mib: float
    descriptors: int
    files: int

    @classmethod
    def now(cls, pids: Sequence[int], nvme_dir: Path) -> Held:
        processes = [psutil.Process(pid) for pid in pids]
        return cls(
            rss_mib=sum(process.memory_info().rss for process in processes) / 2**20,
            descriptors=sum(process.num_fds() for process in processes),
            files=sum(path.is_file() for path in nvme_dir.rglob("*")),
        )


def long(folder: Path, rounds: int) -> None:
    """2,000 requests in four parts; what is held after each."""
    path = write_checkpoint("llama-tiny-fp32", folder)
    nvme_dir = folder / "nvme-long"
    draw = random.Random(0)
    known = prompts_of_lengths([draw.randint(1, 90) for _ in range(40)])
    known[1] = known[0][: len(known[0]) // 2] + known[1]  # a prefix that two share
    expected = reference_tokens(path, known, LONG_TOKENS)
    plan = long_plan(path, nvme_dir)
    config = EngineConfig(model=str(path), nvme_dir=nvme_dir, block_size=plan.block_size)
    engine = AsyncEngine(config, plan=plan)
    scheduler = engine._engine._scheduler
    pids = [os.getpid(), *engine._engine._executor.worker_pids]  # type: ignore[attr-defined]
    wrong = aborted = 0

    async def ask(number: int) -> None:
        nonlocal wrong, aborted
        which = draw.randrange(len(known))
        count = draw.randint(1, LONG_TOKENS)
        stop_after = draw.randint(1, count) if draw.random() < 0.25 else None
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        await asyncio.sleep(draw.random() * LONG_SPREAD_S)
        tokens: list[int] = []
        deltas = engine.generate(known[which], params, request_id=str(number))
        async for delta in deltas:
            tokens += delta.token_ids
            if stop_after is not None and len(tokens) >= stop_after:
                await deltas.aclose()  # type: ignore[attr-defined]
                aborted += 1
                break
        whole = stop_after is None
        wrong += tokens != expected[which][: count if whole else len(tokens)]

    async def part(first: int) -> None:
        await asyncio.gather(*(ask(first + index) for index in range(LONG_REQUESTS // 4)))

    print(header("2,000 mixed requests through tiny tiers"))
    print("| requests | resident MiB | descriptors | files | preemptions |")
    print("|---|---|---|---|---|")
    seen = []

    async def every_part() -> dict[str, Any]:
        for first in range(0, LONG_REQUESTS, LONG_REQUESTS // 4):
            await part(first)
            held = Held.now(pids, nvme_dir)
            seen.append(held)
            print(
                f"| {first + LONG_REQUESTS // 4} | {held.rss_mib:.0f} | {held.descriptors} "
                f"| {held.files} | {scheduler.num_preemptions} |",
                flush=True,
            )
        stats = await engine.stats()
        scheduler.check_integrity()
        await engine.close()
        return stats

    stats = asyncio.run(every_part())
    kv = stats["kv"]
    growth = seen[-1].rss_mib / seen[0].rss_mib - 1
    pools = ("device", "host", "rotating")
    free = ", ".join(f"{p} {kv[f'{p}_blocks_free']} of {kv[f'{p}_blocks']}" for p in pools)
    print(f"\n{wrong} wrong answers of {LONG_REQUESTS}, {aborted} given up; ", end="")
    print(f"free blocks at the end: {free}; ", end="")
    print(f"memory grew by {growth:.1%} after the first quarter")
    leaks = [p for p in pools if kv[f"{p}_blocks_free"] < kv[f"{p}_blocks"]]
    if wrong or leaks or stats["running"] or seen[-1].descriptors > seen[0].descriptors:
        raise SystemExit("something is wrong or was left behind")


def prompts_of_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Random prompts for the tiny model."""
    draw = random.Random(1)
    return [[draw.randrange(3, 512) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def reference_tokens(path: Path, known: list[list[int]], count: int) -> list[list[int]]:
    """What transformers.generate continues each prompt with."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    return [
        model.generate(torch.tensor([prompt]), pad_token_id=0, eos_token_id=None, **options)[
            0, len(prompt) :
        ].tolist()
        for prompt in known
    ]
