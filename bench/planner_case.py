"""One configuration for the planner: planned on this machine as it is now, and run."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from shapes import write_checkpoint
from throttle import Throttle

from giantserve.async_engine import AsyncEngine
from giantserve.calibrate import calibrate
from giantserve.config import EngineConfig
from giantserve.executor.launcher import Launcher
from giantserve.sampling_params import SamplingParams
from kvcache.tier import TierBudget
from partition import (
    Bandwidths,
    ClusterSpec,
    Constraints,
    Link,
    ModelProfile,
    PartitionPlan,
    PlanError,
    Workload,
    plan,
)
from partition.cluster import DeviceSpec, NodeSpec

OUTPUT_TOKENS, WARM_TOKENS = 24, 8
"""Of a sequence, and those of them before the steady state: the ring was filled while nothing ran.
"""

ATTEMPTS = 6
TIERS = {
    "device": (1.0, 0.0),
    "half on host": (0.5, 0.5),
    "half on disk": (0.5, 0.0),
    "0.1 + 0.3 + 0.6": (0.1, 0.3),
    "0.1 + 0 + 0.9": (0.1, 0.0),
}
"""Shares of the weights that the device and the host may hold; the rest is on NVMe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration. ``disks`` are the shards' rates, one for all or one each;
    ``device_bytes`` the shards' device budgets, where ``tiers`` does not say them."""

    shape: str
    layout: tuple[int, int]
    tiers: str
    batch: int
    context: int
    disks: tuple[float | None, ...] = (None,)
    device_bytes: tuple[int, ...] = ()

    @property
    def device_share(self) -> float:
        """Of the weights, for all devices together."""
        return TIERS[self.tiers][0]

    @property
    def host_share(self) -> float:
        return TIERS[self.tiers][1]

    @property
    def workload(self) -> Workload:
        return Workload(
            prompt_tokens=self.context, output_tokens=OUTPUT_TOKENS, concurrency=self.batch
        )

    def __str__(self) -> str:
        disks = "-".join("free" if rate is None else f"{rate / 1e6:.0f}" for rate in self.disks)
        tensor, pipeline = self.layout
        return (
            f"{self.shape} | {tensor} x {pipeline} | {self.tiers} | {disks} | {self.batch} "
            f"| {self.context}"
        )


class Machine:
    """This machine as the planner sees it now."""

    def __init__(self, folder: Path) -> None:
        found = calibrate(folder, refresh=True)
        self.rates: Bandwidths = found.bandwidths
        self.link: Link = found.link

    def cluster(self, budgets: list[TierBudget], disks: tuple[float | None, ...]) -> ClusterSpec:
        """One shard a budget; throttled disks are the shards' own."""
        each = disks * len(budgets) if len(disks) == 1 else disks
        devices = tuple(
            DeviceSpec(
                name=f"device-{index}",
                budget=budget,
                bandwidths=self.rates if rate is None else replace(self.rates, disk_read=rate),
            )
            for index, (budget, rate) in enumerate(zip(budgets, each, strict=True))
        )
        shared = ("memory", "compute") if each[0] is not None else ("disk", "memory", "compute")
        node = NodeSpec(
            devices=devices,
            name="local",
            link=self.link,
            shared=shared,
            num_cores=os.cpu_count(),
        )
        return ClusterSpec(nodes=(node,))


class Bench:
    """Plans, runs and compares."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._launcher = Launcher()
        self._profiles: dict[str, ModelProfile] = {}

    def close(self) -> None:
        self._launcher.close()

    def path(self, shape: str) -> Path:
        return write_checkpoint(shape, self._folder)

    def profile(self, shape: str) -> ModelProfile:
        if shape not in self._profiles:
            self._profiles[shape] = ModelProfile.from_pretrained(self.path(shape))
        return self._profiles[shape]

    def plan(
        self, case: Case, machine: Machine, constraints: Constraints | None = None
    ) -> PartitionPlan:
        """The best plan for the case, its budgets the least that leave the weights their shares;
        raises PlanError where there is none."""
        tensor, pipeline = case.layout
        profile = self.profile(case.shape)
        shards = tensor * pipeline
        fixed = replace(
            constraints or Constraints(),
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            max_num_seqs=case.batch,
            max_model_len=case.context + OUTPUT_TOKENS,
            max_num_batched_tokens=max(case.batch, min(512, case.batch * case.context)),
        )

        def planned(device_bytes: tuple[int, ...]) -> PartitionPlan:
            budgets = [
                TierBudget(
                    device_bytes=num_bytes,
                    host_bytes=int(case.host_share * profile.num_bytes / shards),
                    nvme_bytes=64 << 30,
                )
                for num_bytes in device_bytes
            ]
            return plan(
                profile,
                machine.cluster(budgets, case.disks),
                case.workload,
                constraints=fixed,
                model=str(self.path(case.shape)),
            )

        if case.device_bytes:
            return planned(case.device_bytes)
        roomy = planned((8 * profile.num_bytes + (4 << 30),) * shards)
        if case.device_share >= 1:
            return roomy
        largest = max(p.num_bytes for p in roomy.shards[0].placements)
        beside = max(shard.workspace_bytes for shard in roomy.shards) + 4 * largest
        device_bytes = int(case.device_share * profile.num_bytes / shards) + beside
        for _ in range(ATTEMPTS):
            try:
                return planned((device_bytes,) * shards)
            except PlanError:
                device_bytes += largest
        return planned((device_bytes,) * shards)

    def measure(self, made: PartitionPlan, case: Case) -> float:
        """Seconds between two tokens of a sequence while all sequences decode."""
        return asyncio.run(self._measure(made, case))

    async def _measure(self, made: PartitionPlan, case: Case) -> float:
        nvme_dir = self._folder / "nvme"
        config = EngineConfig(
            model=made.model,
            nvme_dir=nvme_dir,
            max_num_seqs=case.batch,
            max_model_len=made.max_model_len,
        )
        engine = await asyncio.to_thread(AsyncEngine, config, plan=made, launcher=self._launcher)
        with ExitStack() as throttles:
            try:
                pids = engine._engine._executor.worker_pids  # type: ignore[attr-defined]
                each = case.disks * len(pids) if len(case.disks) == 1 else case.disks
                for index, (pid, rate) in enumerate(zip(pids, each, strict=True)):
                    if rate is not None:
                        throttles.enter_context(Throttle(str(index), pid, nvme_dir, rate))
                await self._decode(engine, case, 2)
                return await self._decode(engine, case, OUTPUT_TOKENS)
            finally:
                await engine.close()

    async def _decode(self, engine: AsyncEngine, case: Case, output_tokens: int) -> float:
        draw = random.Random(time.time_ns())
        params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)

        async def one(index: int) -> list[float]:
            prompt = [draw.randrange(3, 8000) for _ in range(case.context)]
            times: list[float] = []
            async for delta in engine.generate(prompt, params, request_id=f"{draw.random()}"):
                times.extend([time.perf_counter()] * len(delta.token_ids))
            return times

        every = await asyncio.gather(*(one(index) for index in range(case.batch)))
        begin, end = max(times[0] for times in every), min(times[-1] for times in every)
        longest = max(every, key=lambda times: times[0])
        inside = [moment for moment in longest[WARM_TOKENS:] if begin <= moment <= end]
        if len(inside) < 3:
            return (longest[-1] - longest[0]) / max(1, len(longest) - 1)
        return (inside[-1] - inside[0]) / (len(inside) - 1)
