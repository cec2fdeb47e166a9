"""Offline speed on the 2.2 GB Llama shape (22 layers x 2048, 32 heads, 4 KV heads, vocabulary
32000, bf16).

python bench/offline.py resident          decode against transformers.generate, 128 in / 32 out
python bench/offline.py tensor-parallel   two single-threaded shards against one with two threads
python bench/offline.py streamed          90 % of the weights on NVMe against an I/O-only loop

Every ratio is of two measurements that alternate within one run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from report import header, run_mode, spread
from shapes import write_checkpoint

from giantserve import LLM, SamplingParams
from giantserve.config import EngineConfig
from giantserve.planning import resolve
from kvcache.arena import Arena
from kvcache.storage import BACKENDS
from kvcache.tier import Tier
from partition import PartitionPlan

SHAPE = "llama-2.2gb"
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32
KV_BLOCKS = 64 * 4


def prompts(batch: int, num_tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Distinct random prompts, so that no prefix is shared."""
    generator = torch.Generator().manual_seed(time.time_ns() % (1 << 31))
    return torch.randint(3, 32000, (batch, num_tokens), generator=generator).tolist()


def decode_rate(
    llm: LLM, batch: int, output_tokens: int = OUTPUT_TOKENS, prompt_tokens: int = PROMPT_TOKENS
) -> tuple[float, float]:
    """(decode tokens/s after the first token of the last sequence, prefill seconds)."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(prompts(batch, prompt_tokens), params)
    begin = max(output.time_to_first_token_s for output in outputs)
    end = max(output.latency_s for output in outputs)
    return batch * (output_tokens - 1) / (end - begin), begin


@torch.inference_mode()
def transformers_rate(model: transformers.PreTrainedModel, batch: int) -> tuple[float, float]:
    """The same of transformers.generate, its first token timed by a call that stops there."""
    ids = torch.tensor(prompts(batch))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    times = []
    for count in (1, OUTPUT_TOKENS):
        begin = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            **options,
        )
        times.append(time.perf_counter() - begin)
    return batch * (OUTPUT_TOKENS - 1) / (times[1] - times[0]), times[0]


def resident(folder: Path, rounds: int) -> None:
    """All weights on the device; ours and transformers in turn."""
    path = write_checkpoint(SHAPE, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    print(header("Offline decode, all resident"))
    print("| batch | ours tok/s | transformers tok/s | ratio | prefill s | transformers s |")
    print("|---|---|---|---|---|---|")
    with LLM(path, max_model_len=512) as llm:
        for batch in (1, 8, 32):
            decode_rate(llm, batch)
            transformers_rate(model, batch)
            pairs = [
                (decode_rate(llm, batch), transformers_rate(model, batch)) for _ in range(rounds)
            ]
            ours, theirs = zip(*pairs, strict=True)
            ratios = [a[0] / b[0] for a, b in pairs]
            print(
                f"| {batch} | {spread([r[0] for r in ours], 1)} "
                f"| {spread([r[0] for r in theirs], 1)} "
                f"| {spread(ratios, 2)} | {spread([r[1] for r in ours])} "
                f"| {spread([r[1] for r in theirs])} |",
                flush=True,
            )
        print(f"\nroofline fraction: {llm.stats()['roofline_fraction']:.2f}")


def tensor_parallel(folder: Path, rounds: int) -> None:
    """Two single-threaded shards against one shard with two threads."""
    path = write_checkpoint(SHAPE, folder)
    options = {"nvme_dir": folder / "nvme", "max_model_len": 512}
    print(header("Tensor parallelism over two processes"))
    print("| batch | TP 2 x 1 thread tok/s | TP 1 x 2 threads tok/s | ratio |")
    print("|---|---|---|---|")
    split = LLM(path, tensor_parallel=2, threads_per_shard=1, device_memory="6GiB", **options)
    with split, LLM(path, threads_per_shard=2, device_memory="6GiB", **options) as whole:
        for batch in (1, 8, 32):
            decode_rate(split, batch)
            decode_rate(whole, batch)
            pairs = [
                (decode_rate(split, batch)[0], decode_rate(whole, batch)[0]) for _ in range(rounds)
            ]
            print(
                f"| {batch} | {spread([p[0] for p in pairs], 1)} "
                f"| {spread([p[1] for p in pairs], 1)} "
                f"| {spread([a / b for a, b in pairs], 2)} |",
                flush=True,
            )


def streamed_plan(path: Path, nvme_dir: Path, share: float) -> PartitionPlan:
    """The planner's own plan for a device that holds all but ``share`` of the weights, and no host
    memory."""
    config = EngineConfig(model=str(path), nvme_dir=nvme_dir, max_model_len=512, max_num_seqs=64)
    full = resolve(config)
    weights = full.profile.num_bytes
    low, high = 0, 4 * weights
    while high - low > 1 << 20:
        middle = (low + high) // 2
        try:
            plan = resolve(replace(config, device_memory=middle, host_memory=0)).plan
        except ValueError:
            low = middle
            continue
        if plan.shards[0].weight_bytes(Tier.NVME) > share * weights:
            low = middle
        else:
            high = middle
    plan = resolve(replace(config, device_memory=high, host_memory=0)).plan
    (shard,) = plan.shards
    kv_bytes = KV_BLOCKS * full.profile.kv_layout(0, 22, plan.block_size).block_bytes
    largest = max(p.num_bytes for p in shard.placements if p.tier is Tier.NVME)
    ring_bytes = max(shard.ring_bytes, 4 * largest)
    device_bytes = shard.budget.device_bytes - shard.device_kv_bytes + kv_bytes
    device_bytes += ring_bytes - shard.ring_bytes
    shard = replace(
        shard,
        ring_bytes=ring_bytes,
        device_kv_bytes=kv_bytes,
        budget=replace(shard.budget, device_bytes=device_bytes),
    )
    stage = replace(plan.stages[0], shards=(shard,))
    return replace(plan, stages=(stage,), num_device_blocks=KV_BLOCKS)


def newest_store(nvme_dir: Path) -> Path:
    """The weights that were packed last."""
    indices = (nvme_dir / "weights").glob("*.json")
    return max(indices, key=lambda path: path.stat().st_mtime).with_suffix(".weights")


def io_loop(plan: PartitionPlan, nvme_dir: Path) -> Callable[[], float]:
    """A function that reads the plan's streamed units once, as fast as the backend goes;
    seconds."""
    weights = newest_store(nvme_dir)
    index = json.loads(weights.with_suffix(".json").read_text())
    units = {unit["name"]: unit for unit in index["units"]}
    names = [
        p.unit for p in plan.shards[0].placements if p.tier is Tier.NVME and p.unit != "embedding"
    ]
    extents = [(units[name]["offset"], units[name]["num_bytes"]) for name in names]
    backend = BACKENDS["posix"]()
    file = backend.open(weights)
    arena = Arena(Tier.DEVICE, 4 * max(size for _, size in extents), torch.device("cpu"))
    buffers = [arena.allocate(max(size for _, size in extents)) for _ in range(4)]

    def run() -> float:
        begin = time.perf_counter()
        flying = []
        for number, (offset, size) in enumerate(extents):
            if len(flying) == len(buffers):
                flying.pop(0).result()
            flying.append(backend.submit(file, offset, buffers[number % len(buffers)][:size]))
        for future in flying:
            future.result()
        return time.perf_counter() - begin

    return run


def streamed_bytes(plan: PartitionPlan) -> int:
    """What a pass of the first shard reads from NVMe, but for rows of the embedding."""
    return sum(
        p.num_bytes
        for p in plan.shards[0].placements
        if p.tier is Tier.NVME and p.unit != "embedding"
    )


def streamed(folder: Path, rounds: int) -> None:
    """90 % of the weights on NVMe: a decode pass against reading the same bytes and nothing
    else."""
    path = write_checkpoint(SHAPE, folder)
    nvme_dir = folder / "nvme-streamed"
    plan = streamed_plan(path, nvme_dir, 0.9)
    moved = streamed_bytes(plan)
    print(header("Decode with 90 % of the weights on NVMe"))
    print(f"plan: {plan.reason}; {moved / 1e9:.2f} GB read a pass\n")
    print("| batch | pass s | I/O-only s | ratio | GB/s of the pass | fraction of the ceiling |")
    print("|---|---|---|---|---|---|")
    with LLM(path, plan=plan, nvme_dir=nvme_dir, max_model_len=512) as llm:
        read = io_loop(plan, nvme_dir)
        read()
        for batch in (1, 8, 32, 64):
            rows = []
            for _ in range(rounds):
                ceiling = statistics.median(read() for _ in range(3))
                rate, _ = decode_rate(llm, batch, 9, prompt_tokens=16)
                rows.append((batch / rate, ceiling))
            print(
                f"| {batch} | {spread([p for p, _ in rows])} | {spread([c for _, c in rows])} "
                f"| {spread([p / c for p, c in rows], 2)} "
                f"| {spread([moved / p / 1e9 for p, _ in rows], 2)} "
                f"| {spread([c / p for p, c in rows], 2)} |",
                flush=True,
            )


MODES = {"resident": resident, "tensor-parallel": tensor_parallel, "streamed": streamed}


if __name__ == "__main__":
    run_mode(__doc__, MODES, rounds=5)
