"""Whether forecasts hold: decode passes as the planner prices them against passes that run.

    python bench/planner.py accuracy   configurations drawn from shapes x TP x PP x tiers x batch x
                                       context, some on throttled disks
    python bench/planner.py choice     the plan chosen against every other layout, measured
    python bench/planner.py uneven     stages on disks of 1x, 2x and 4x against an even split

The machine is calibrated anew before each configuration, so that forecast and run see the same
minute.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import scipy.stats
import torch
import transformers
from report import header
from shapes import write_checkpoint
from throttle import Throttle

from giantserve.async_engine import AsyncEngine
from giantserve.calibrate import calibrate
from giantserve.config import EngineConfig
from giantserve.executor.launcher import Launcher
from giantserve.sampling_params import SamplingParams
from kvcache.tier import Tier, TierBudget
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

OUTPUT_TOKENS = 14
SHAPES = ("llama-0.2gb", "llama-0.5gb", "llama-0.8gb")
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 3))
TIERS = {
    "device": (1.0, 0.0),
    "half on host": (0.5, 0.5),
    "half on disk": (0.5, 0.0),
    "0.1 + 0.3 + 0.6": (0.1, 0.3),
    "0.1 + 0 + 0.9": (0.1, 0.0),
}
"""Shares of the weights that the device and the host may hold; the rest is on NVMe."""

BATCHES = (1, 4, 8, 16, 32)
CONTEXTS = (32, 200, 800)
DISKS = (None, 4e8, 8e8)
"""Bytes/s to which each shard's disk is throttled; None: as it is, shared by the shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration. ``disks`` are the shards' rates, one for all or one each."""

    shape: str
    layout: tuple[int, int]
    tiers: str
    batch: int
    context: int
    disks: tuple[float | None, ...] = (None,)

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
        node = NodeSpec(devices=devices, name="local", link=self.link, shared=shared)
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

    def plan(self, case: Case, machine: Machine) -> PartitionPlan:
        """The best plan for the case; raises PlanError where there is none."""
        tensor, pipeline = case.layout
        profile = self.profile(case.shape)
        shards = tensor * pipeline
        on_device, on_host = TIERS[case.tiers]
        constraints = Constraints(
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            max_num_seqs=case.batch,
            max_model_len=case.context + OUTPUT_TOKENS,
        )

        def planned(device_bytes: int) -> PartitionPlan:
            budget = TierBudget(
                device_bytes=device_bytes,
                host_bytes=int(on_host * profile.num_bytes / shards),
                nvme_bytes=64 << 30,
            )
            cluster = machine.cluster([budget] * shards, case.disks)
            return plan(
                profile,
                cluster,
                case.workload,
                constraints=constraints,
                model=str(self.path(case.shape)),
            )

        return least_device_bytes(planned, on_device, profile.num_bytes)

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
                return await self._decode(engine, case)
            finally:
                await engine.close()

    async def _decode(
        self, engine: AsyncEngine, case: Case, output_tokens: int = OUTPUT_TOKENS
    ) -> float:
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
        inside = [moment for moment in longest if begin <= moment <= end]
        if len(inside) < 3:
            return (longest[-1] - longest[0]) / max(1, len(longest) - 1)
        return (inside[-1] - inside[0]) / (len(inside) - 1)


def least_device_bytes(
    planned: Callable[[int], PartitionPlan], share: float, num_bytes: int
) -> PartitionPlan:
    """The plan of the smallest device budget that keeps ``share`` of the streamable weights."""
    low, high = 0, 4 * num_bytes + (4 << 30)
    best = planned(high)
    if share >= 1:
        return best
    while high - low > 4 << 20:
        middle = (low + high) // 2
        try:
            made = planned(middle)
        except PlanError:
            low = middle
            continue
        held = sum(shard.weight_bytes(Tier.DEVICE) for shard in made.shards)
        if held < share * num_bytes:
            low = middle
        else:
            best, high = made, middle
    return best


def cases(count: int, seed: int) -> Iterator[Case]:
    """Distinct configurations, drawn evenly."""
    draw = random.Random(seed)
    every = [
        Case(
            shape=shape,
            layout=layout,
            tiers=tiers,
            batch=batch,
            context=context,
            disks=(disk,),
        )
        for shape, layout, tiers, batch, context, disk in itertools.product(
            SHAPES, LAYOUTS, TIERS, BATCHES, CONTEXTS, DISKS
        )
        if (disk is None or "disk" in tiers or "0." in tiers)
        and batch * context <= 2400
        and batch >= layout[1]
    ]
    yield from draw.sample(every, count)


def accuracy(folder: Path, count: int, seed: int) -> None:
    """Forecast against measured decode passes."""
    print(header("Forecasts of decode passes"))
    print(
        "| shape | TP x PP | tiers | disk MB/s | batch | context | in flight | forecast s "
        "| measured s | error | binds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    bench = Bench(folder)
    pairs: list[tuple[float, float]] = []
    try:
        for case in cases(count, seed):
            machine = Machine(folder)
            try:
                made = bench.plan(case, machine)
            except PlanError as error:
                print(f"no plan for {case}: {error}", file=sys.stderr)
                continue
            seconds = bench.measure(made, case)
            forecast = made.forecast.decode_pass_s
            pairs.append((forecast, seconds))
            print(
                f"| {case} | {made.passes_in_flight} | {forecast:.4f} | {seconds:.4f} "
                f"| {forecast / seconds - 1:+.1%} | {made.forecast.binds} |",
                flush=True,
            )
    finally:
        bench.close()
    errors = sorted(abs(forecast / seconds - 1) for forecast, seconds in pairs)
    tau = scipy.stats.kendalltau(*zip(*pairs, strict=True)).statistic
    print(
        f"\n{len(pairs)} configurations: median error {statistics.median(errors):.1%} (target 10 "
        f"%), 90th percentile {errors[int(0.9 * len(errors))]:.1%} (target 25 %), Kendall tau "
        f"{tau:.3f} (target 0.9)"
    )


MODES = {"accuracy": accuracy}


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mode", choices=MODES)
    parser.add_argument(
        "--folder", type=Path, default=Path(".bench"), help="where checkpoints are kept"
    )
    parser.add_argument("--count", type=int, default=48, help="configurations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    MODES[options.mode](options.folder.absolute(), options.count, options.seed)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
