"""Whether forecasts hold: decode passes as the planner prices them against passes that run.

    python bench/planner.py accuracy   configurations drawn from shapes x TP x PP x tiers x batch x
                                       context, some on throttled disks
    python bench/planner.py choice     the plan chosen against every other layout, measured
    python bench/planner.py uneven     stages on disks and memories of 1x, 2x and 4x against an even
                                       split

The machine is calibrated anew every few runs, so that forecast and run see the same minutes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import scipy.stats
import torch
import transformers
from planner_case import TIERS, Bench, Case, Machine
from report import header, spread

from partition import Constraints, PartitionPlan, PlanError

SHAPES = ("llama-0.2gb", "llama-0.5gb", "llama-0.8gb")
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 3))
BATCHES = (1, 4, 8, 16, 32)
CONTEXTS = (32, 200, 800)
DISKS = (None, 4e8, 8e8)
"""Bytes/s to which each shard's disk is throttled; None: as it is, shared by the shards."""

MOST_TOKENS = 1600
RUNS_A_CALIBRATION = 3
ROUNDS = 3
SETTINGS = (
    Case(shape="llama-0.5gb", layout=(1, 1), tiers="device", batch=1, context=200),
    Case(shape="llama-0.5gb", layout=(1, 1), tiers="device", batch=16, context=32),
    Case(shape="llama-0.5gb", layout=(1, 1), tiers="half on disk", batch=4, context=32),
    Case(
        shape="llama-0.5gb",
        layout=(1, 1),
        tiers="0.1 + 0 + 0.9",
        batch=8,
        context=32,
        disks=(4e8,),
    ),
    Case(shape="llama-0.8gb", layout=(1, 1), tiers="0.1 + 0.3 + 0.6", batch=8, context=200),
)
CHOICES = ((1, 1), (2, 1), (1, 2))
UNEVEN = Case(
    shape="llama-0.7gb-deep",
    layout=(1, 3),
    tiers="0.1 + 0 + 0.9",
    batch=6,
    context=32,
    disks=(1e8, 2e8, 4e8),
    device_bytes=(96 << 20, 192 << 20, 384 << 20),
)


def cases(count: int, seed: int) -> Iterator[Case]:
    """Distinct configurations, drawn evenly over the tiers."""
    draw = random.Random(seed)
    by_tiers = {
        tiers: [
            Case(
                shape=shape, layout=layout, tiers=tiers, batch=batch, context=context, disks=(disk,)
            )
            for shape, layout, batch, context, disk in itertools.product(
                SHAPES, LAYOUTS, BATCHES, CONTEXTS, DISKS
            )
            if (disk is None or "disk" in tiers or "0." in tiers)
            and batch * context <= MOST_TOKENS
            and batch >= layout[1]
        ]
        for tiers in TIERS
    }
    each = -(-count // len(by_tiers))
    chosen = [case for every in by_tiers.values() for case in draw.sample(every, each)]
    draw.shuffle(chosen)
    yield from chosen[:count]


def accuracy(bench: Bench, folder: Path, count: int, seed: int) -> None:
    """Forecast against measured decode passes."""
    print(header("Forecasts of decode passes"))
    print(
        "| shape | TP x PP | tiers | disk MB/s | batch | context | in flight | forecast s "
        "| measured s | error | binds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    pairs: list[tuple[float, float]] = []
    for number, case in enumerate(cases(count, seed)):
        if number % RUNS_A_CALIBRATION == 0:
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
    errors = sorted(abs(forecast / seconds - 1) for forecast, seconds in pairs)
    tau = scipy.stats.kendalltau(*zip(*pairs, strict=True)).statistic
    print(
        f"\n{len(pairs)} configurations: median error {statistics.median(errors):.1%} (target 10 "
        f"%), 90th percentile {errors[int(0.9 * len(errors))]:.1%} (target 25 %), Kendall tau "
        f"{tau:.3f} (target 0.9)"
    )


def choice(bench: Bench, folder: Path, count: int, seed: int) -> None:
    """The layout with the best forecast against all, measured in turns; each round calibrates anew
    and chooses anew."""
    print(header("The plan chosen against every other layout"))
    print("| setting | layout | forecast tokens/s | measured tokens/s | times chosen |")
    print("|---|---|---|---|---|")
    behind = []
    for setting in SETTINGS:
        layouts = [layout for layout in CHOICES if setting.batch >= layout[1]]
        forecasts: dict[tuple[int, int], list[float]] = {layout: [] for layout in layouts}
        rates: dict[tuple[int, int], list[float]] = {layout: [] for layout in layouts}
        chosen = []
        for _ in range(ROUNDS):
            machine = Machine(folder)
            for layout in layouts:
                case = replace(setting, layout=layout)
                made = bench.plan(case, machine)
                forecasts[layout].append(made.forecast.tokens_per_s)
                rates[layout].append(case.batch / bench.measure(made, case))
            chosen.append(max(layouts, key=lambda layout: forecasts[layout][-1]))
        losses = [
            1 - rates[layout][turn] / max(found[turn] for found in rates.values())
            for turn, layout in enumerate(chosen)
        ]
        behind.append(statistics.median(losses))
        for layout in layouts:
            print(
                f"| {setting} | {layout[0]} x {layout[1]} | {spread(forecasts[layout], 1)} "
                f"| {spread(rates[layout], 1)} | {chosen.count(layout)} |",
                flush=True,
            )
    print(
        f"\nthe plan chosen is behind the best measured in its round by "
        f"{', '.join(f'{share:.1%}' for share in behind)}, the median of {ROUNDS} (target: at most "
        "5 %)"
    )


def uneven(bench: Bench, folder: Path, count: int, seed: int) -> None:
    """Three stages on devices of 1x, 2x and 4x disk bandwidth and memory: the planner's split
    against an even one, in turns."""
    print(header("Stages on unequal devices"))
    machine = Machine(folder)
    layers = bench.profile(UNEVEN.shape).num_layers
    share, more = divmod(layers, 3)
    even = tuple(share + (stage < more) for stage in range(3))
    plans = {
        "even": bench.plan(UNEVEN, machine, Constraints(layer_split=even)),
        "planned": bench.plan(UNEVEN, machine),
    }
    times: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(ROUNDS):
        for name, made in plans.items():
            times[name].append(bench.measure(made, _in_place(UNEVEN, made)))
    print("| split | layers by stage | devices | forecast s | measured s: median (range) |")
    print("|---|---|---|---|---|")
    for name, made in plans.items():
        found = times[name]
        print(
            f"| {name} | {', '.join(str(s.end_layer - s.first_layer) for s in made.stages)} "
            f"| {', '.join(shard.device for shard in made.shards)} "
            f"| {made.forecast.decode_pass_s:.3f} | {statistics.median(found):.3f} "
            f"({min(found):.3f}-{max(found):.3f}) |"
        )
    forecast = plans["even"].forecast.decode_pass_s / plans["planned"].forecast.decode_pass_s
    measured = statistics.median(times["even"]) / statistics.median(times["planned"])
    print(f"\nan even split takes {forecast:.2f}x as long by forecast, {measured:.2f}x measured")
    print("(target: at least 1.8x)")


def _in_place(case: Case, made: PartitionPlan) -> Case:
    """The case with its disks in the order in which the plan uses the devices."""
    return replace(
        case, disks=tuple(case.disks[int(s.device.rpartition("-")[2])] for s in made.shards)
    )


MODES = {"accuracy": accuracy, "choice": choice, "uneven": uneven}


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mode", choices=MODES)
    parser.add_argument(
        "--folder", type=Path, default=Path(".bench"), help="where checkpoints are kept"
    )
    parser.add_argument("--count", type=int, default=45, help="configurations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    folder = options.folder.absolute()
    bench = Bench(folder)
    try:
        MODES[options.mode](bench, folder, options.count, options.seed)
    finally:
        bench.close()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
