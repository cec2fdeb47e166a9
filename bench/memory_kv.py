"""KV beyond the device: of running sequences, of cached prefixes, in fewer bits."""

from __future__ import annotations

import random
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from memory_weights import read_so_far
from offline import decode_rate, prompts
from report import header, spread
from shapes import write_checkpoint

from giantserve import LLM, SamplingParams
from giantserve.calibrate import calibrate
from giantserve.config import EngineConfig
from giantserve.outputs import PositionLogprobs
from giantserve.planning import problem_here, resolve
from kvcache.tier import Tier
from partition import Bandwidths, PartitionPlan
from partition.pass_work import pass_work
from partition.problem import PlanningProblem

SHAPE = "llama-2.2gb"
SEQUENCES, ON_DEVICE = 128, 8
PROMPT_TOKENS, OUTPUT_TOKENS = 96, 32
LONG_SHAPE, LONG_PROMPT_TOKENS = "llama-0.2gb-mha", 224
SCATTERING = 256
BUDGET = 8 << 30
PREFIX_TOKENS, FEW_BLOCKS = 2000, 4


def rotation_config(path: Path, nvme_dir: Path, prompt_tokens: int = PROMPT_TOKENS) -> EngineConfig:
    return EngineConfig(
        model=str(path),
        nvme_dir=nvme_dir,
        device_memory=BUDGET,
        host_memory=BUDGET // 2,
        tensor_parallel=1,
        pipeline_parallel=1,
        max_num_seqs=SEQUENCES,
        max_model_len=prompt_tokens + OUTPUT_TOKENS,
        prompt_tokens=prompt_tokens,
        output_tokens=OUTPUT_TOKENS,
        concurrency=SEQUENCES,
    )


def rotation_plans(config: EngineConfig) -> dict[str, PartitionPlan]:
    """The same plan with all KV on the device, and with all but 8 sequences' beyond it."""
    plan = resolve(config).plan
    tokens = plan.max_model_len
    blocks = -(-tokens // plan.block_size)
    base = replace(
        plan,
        num_device_blocks=SEQUENCES * blocks,
        num_host_blocks=0,
        num_rotating_host_blocks=0,
        num_rotating_nvme_blocks=0,
        num_rotation_slots=0,
        num_tail_blocks=0,
    )
    few = replace(
        base, num_device_blocks=ON_DEVICE * blocks, num_rotation_slots=SEQUENCES * blocks // 2
    )
    rest = (SEQUENCES - ON_DEVICE) * blocks
    return {
        "device": base,
        "host, attended to there": replace(
            few, num_rotating_host_blocks=rest, attends_on_host=True
        ),
        "host, rotating": replace(few, num_rotating_host_blocks=rest),
        "NVMe": replace(few, num_rotating_nvme_blocks=rest, num_tail_blocks=SEQUENCES),
    }


def rotation(folder: Path, rounds: int) -> None:
    """Where the products bind: short sequences, and a model that shares its KV heads."""
    _rotation(folder, rounds, SHAPE, PROMPT_TOKENS)


def rotation_long(folder: Path, rounds: int) -> None:
    """Where KV is most of a pass: longer sequences, and a KV head for each query head."""
    _rotation(folder, rounds, LONG_SHAPE, LONG_PROMPT_TOKENS)


def _rotation(folder: Path, rounds: int, shape: str, prompt_tokens: int) -> None:
    """Decode passes with KV on each tier, in turns."""
    path = write_checkpoint(shape, folder)
    nvme_dir = folder / "nvme"
    config = rotation_config(path, nvme_dir, prompt_tokens)
    plans = rotation_plans(config)
    profile = resolve(EngineConfig(model=str(path), nvme_dir=nvme_dir)).profile
    layout = profile.kv_layout(0, profile.num_layers, plans["device"].block_size)
    kv_bytes = SEQUENCES * (prompt_tokens + OUTPUT_TOKENS / 2) * layout.bytes_per_token
    print(header("KV of running sequences beyond the device"))
    passes: dict[str, list[float]] = {name: [] for name in plans}
    roofs: dict[str, list[float]] = {name: [] for name in plans}
    forecasts: dict[str, list[float]] = {name: [] for name in plans}
    tokens: dict[str, list[list[int]]] = {}
    fixed = prompts(SEQUENCES, prompt_tokens)
    greedy = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    with ExitStack() as open_now:
        engines = {
            name: open_now.enter_context(
                LLM(path, plan=plan, nvme_dir=nvme_dir, max_model_len=plan.max_model_len)
            )
            for name, plan in plans.items()
        }
        for name, llm in (*engines.items(), ("control", engines["device"])):
            tokens[name] = [output.token_ids for output in llm.generate(fixed, greedy)]
        losses = {name: llm.stats()["kv"]["losses"] for name, llm in engines.items()}
        for _ in range(rounds):
            rates = calibrate(folder, refresh=True).bandwidths
            problem = problem_here(config)
            for name, llm in engines.items():
                passes[name].append(_decode_pass_s(llm, prompt_tokens))
                roofs[name].append(_roof(name, plans[name], kv_bytes, rates))
                forecasts[name].append(_forecast(plans[name], problem))
        _scatter(engines["NVMe"], plans["NVMe"].max_model_len)
        scattered = [
            _decode_pass_s(engines["NVMe"], prompt_tokens)
            / _decode_pass_s(engines["device"], prompt_tokens)
            for _ in range(rounds)
        ]
    print(
        f"{shape}: {SEQUENCES} sequences, {prompt_tokens} in / {OUTPUT_TOKENS} out, bf16; ", end=""
    )
    print(f"{kv_bytes / 1e9:.2f} GB of KV, of which {ON_DEVICE} sequences' on the device\n")
    print(
        "| KV | decode pass s | of all on the device | roofline s | pass / roofline "
        "| forecast s | pass / forecast | same tokens |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in plans:
        ratios = [a / b for a, b in zip(passes[name], passes["device"], strict=True)]
        roof = [a / b for a, b in zip(passes[name], roofs[name], strict=True)]
        forecast = [a / b for a, b in zip(passes[name], forecasts[name], strict=True)]
        same = statistics.mean(a == b for a, b in zip(tokens[name], tokens["device"], strict=True))
        print(
            f"| {name} | {spread(passes[name])} | {spread(ratios, 2)} | {spread(roofs[name])} "
            f"| {spread(roof, 2)} | {spread(forecasts[name])} | {spread(forecast, 2)} "
            f"| {same:.0%} |"
        )
    again = statistics.mean(
        a == b for a, b in zip(tokens["control"], tokens["device"], strict=True)
    )
    print(
        f"\nAll on the device twice gives the same tokens in {again:.0%}. KV lost: {losses}. "
        f"(target: within 10 % of the roofline, in which all that a pass does overlaps; the "
        f"planner's forecast adds up what the same cores do)"
    )
    print(
        f"\nAfter {SCATTERING} requests of other lengths, which leave the free blocks on NVMe in "
        f"disorder: {spread(scattered, 2)} of all on the device."
    )


def _decode_pass_s(llm: LLM, prompt_tokens: int) -> float:
    return SEQUENCES / decode_rate(llm, SEQUENCES, OUTPUT_TOKENS, prompt_tokens)[0]


def _scatter(llm: LLM, max_model_len: int) -> None:
    """Requests of random lengths, so that blocks are freed in another order than they lie."""
    rng = random.Random(0)
    lengths = [rng.randint(1, max_model_len - 2) for _ in range(SCATTERING)]
    llm.generate(
        [prompts(1, length)[0] for length in lengths],
        [
            SamplingParams(
                max_tokens=rng.randint(1, min(OUTPUT_TOKENS, max_model_len - length)),
                temperature=0.0,
                ignore_eos=True,
            )
            for length in lengths
        ],
    )


def _forecast(plan: PartitionPlan, problem: PlanningProblem) -> float:
    """Seconds of a decode pass as the planner prices it: the busiest of disk, host link and
    device."""
    (stage,) = pass_work(plan, problem).stages
    return max(
        sum(unit.disk_s for unit in stage.units),
        sum(unit.host_link_s for unit in stage.units),
        stage.overhead_s + sum(unit.compute_s + unit.collectives_s for unit in stage.units),
    )


def _roof(name: str, plan: PartitionPlan, kv_bytes: float, rates: Bandwidths) -> float:
    """max((W + K) / B_m, K_h / B_p, K_n / B_n, 2 P b / F), seconds."""
    weights = plan.shards[0].weight_bytes(Tier.DEVICE)
    beyond = kv_bytes * (1 - ON_DEVICE / SEQUENCES)
    return max(
        (weights + kv_bytes) / rates.device_memory,
        beyond / rates.host_to_device if name.startswith("host") else 0.0,
        beyond / rates.disk_read if name == "NVMe" else 0.0,
        weights * SEQUENCES / rates.flops_per_s(SEQUENCES),
    )


def dtypes(folder: Path, rounds: int) -> None:
    """The same prompts with KV on NVMe in each storage dtype, all sequences beyond the device."""
    path = write_checkpoint(SHAPE, folder)
    nvme_dir = folder / "nvme"
    plan = rotation_plans(rotation_config(path, nvme_dir))["NVMe"]
    fixed = prompts(SEQUENCES, PROMPT_TOKENS)
    greedy = SamplingParams(
        max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, seed=0
    )
    print(header("Storage dtypes of KV on NVMe"))
    print("| dtype | KV read a pass MB | decode pass s | same tokens | log-probability off by |")
    print("|---|---|---|---|---|")
    known: list[list[PositionLogprobs]] = []
    for storage_dtype in ("auto", "auto", "int8", "fp8"):
        made = replace(plan, kv_storage_dtype=storage_dtype)
        with LLM(path, plan=made, nvme_dir=nvme_dir, max_model_len=plan.max_model_len) as llm:
            found = [output.choices[0].logprobs or [] for output in llm.generate(fixed, greedy)]
            before = read_so_far(llm, "kv")
            rates = [
                decode_rate(llm, SEQUENCES, OUTPUT_TOKENS, PROMPT_TOKENS)[0] for _ in range(rounds)
            ]
            after = read_so_far(llm, "kv")
        known = known or found
        a_pass = (after[1] - before[1]) / (after[0] - before[0])
        same, off = _differences(known, found)
        print(
            f"| {storage_dtype} | {a_pass / 1e6:.0f} | {spread([SEQUENCES / r for r in rates])} "
            f"| {same:.1%} | {statistics.mean(off):.4f} (at most {max(off):.3f}) |",
            flush=True,
        )
    print("\nagainst the first run; the second has the same dtype: what differs there is the order")
    print("in which bf16 sums are made. Positions count up to the first token that differs.")


def _differences(
    known: list[list[PositionLogprobs]], found: list[list[PositionLogprobs]]
) -> tuple[float, list[float]]:
    """The share of tokens that come before any difference, and how far those are off."""
    off = []
    for old, new in zip(known, found, strict=True):
        for a, b in zip(old, new, strict=True):
            if a.chosen.token_id != b.chosen.token_id:
                break
            off.append(abs(a.chosen.logprob - b.chosen.logprob))
    return len(off) / sum(map(len, known)), off


def prefix(folder: Path, rounds: int) -> None:
    """TTFT of prompts whose first 2,000 tokens are known, and of prompts that are new, in turns."""
    path = write_checkpoint(SHAPE, folder)
    nvme_dir = folder / "nvme"
    plan = rotation_plans(rotation_config(path, nvme_dir))["NVMe"]
    blocks = -(-PREFIX_TOKENS // plan.block_size) + 2
    plan = replace(
        plan,
        num_device_blocks=FEW_BLOCKS,
        num_rotating_nvme_blocks=2 * blocks,
        num_rotation_slots=blocks,
        max_model_len=blocks * plan.block_size,
        max_num_batched_tokens=512,
    )
    first = SamplingParams(max_tokens=1, temperature=0.0)
    print(header("A prefix of 2,000 tokens on NVMe"))
    cached, computed, shares = [], [], []
    with LLM(path, plan=plan, nvme_dir=nvme_dir, max_model_len=plan.max_model_len) as llm:
        for _ in range(rounds):
            (known,) = prompts(1, PREFIX_TOKENS)
            computed.append(llm.generate([known], first)[0].time_to_first_token_s)
            for _ in range(3):
                (question,) = prompts(1, 8)
                (output,) = llm.generate([known + question], first)
                cached.append(output.time_to_first_token_s)
                assert output.usage is not None
                shares.append(output.usage.cached_tokens / PREFIX_TOKENS)
    print("| TTFT, prefix computed s | TTFT, prefix on NVMe s | ratio | cached |")
    print("|---|---|---|---|")
    ratio = statistics.median(computed) / statistics.median(cached)
    print(f"| {spread(computed)} | {spread(cached)} | {ratio:.1f} | {min(shares):.0%} |")
    print(f"\n{FEW_BLOCKS} of {blocks} blocks of the prefix fit the device (target: at least 5)")
