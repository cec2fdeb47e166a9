"""Weights on NVMe: line rate, no byte twice, experts on demand."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from direct_reads import best_settings, read_rate
from offline import decode_rate, io_loop, newest_store, prompts, streamed_bytes, streamed_plan
from report import header, spread
from shapes import write_checkpoint

from giantserve import LLM, SamplingParams
from kvcache.tier import Tier
from partition import ModelProfile, PartitionPlan
from partition.cost import page_rounded

SHAPE = "llama-2.2gb"
BUDGET = 8 << 30
MIXTURE_DEVICE = 512 << 20
MIXTURE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def line(folder: Path, rounds: int) -> None:
    """Passes, I/O-only passes and plain reads in turns."""
    path = write_checkpoint(SHAPE, folder)
    nvme_dir = folder / "nvme-streamed"
    plan = streamed_plan(path, nvme_dir, 0.9)
    moved = streamed_bytes(plan)
    print(header("Line rate of a decode pass"))
    with LLM(path, plan=plan, nvme_dir=nvme_dir, max_model_len=512) as llm:
        read, weights = io_loop(plan, nvme_dir), newest_store(nvme_dir)
        read()
        block_bytes, depth = best_settings(weights, moved)
        print(f"{moved / 1e9:.2f} GB read a pass; O_DIRECT reads are fastest with {depth} blocks ")
        print(f"of {block_bytes >> 20} MiB in flight\n")
        print(
            "| batch | pass s | I/O only s | plain reads s | pass / I/O only | I/O only / plain |"
        )
        print("|---|---|---|---|---|---|")
        for batch in (1, 8, 64):
            rows = []
            for _ in range(rounds):
                plain = moved / read_rate(weights, moved, block_bytes, depth)
                io_only = statistics.median(read() for _ in range(3))
                rate, _ = decode_rate(llm, batch, 9, prompt_tokens=16)
                rows.append((batch / rate, io_only, plain))
            columns = [spread([row[index] for row in rows]) for index in range(3)]
            ratios = [[a / b for a, b, _ in rows], [b / c for _, b, c in rows]]
            print(
                f"| {batch} | {' | '.join(columns)} "
                f"| {' | '.join(spread(each, 2) for each in ratios)} |",
                flush=True,
            )
    print("\n(targets: at most 1.05 each)")


def moved_bytes(folder: Path, rounds: int) -> None:
    """Disk bytes of decode passes by the shard's own counters.

    The embedding, of which a pass reads rows, is on NVMe always and counts on neither side.
    """
    path = write_checkpoint(SHAPE, folder)
    half = streamed_plan(path, folder / "nvme-streamed", 0.5)
    print(header("Disk bytes of a decode pass"))
    print("| resident | passes | not resident, bytes | read a pass, bytes | ratio |")
    print("|---|---|---|---|---|")
    for share in (0.1, 0.5, 0.9):
        plan = with_resident(half, share)
        streams = sum(
            page_rounded(p.num_bytes)
            for p in plan.shards[0].placements
            if p.tier is Tier.NVME and p.unit != "embedding"
        )
        with LLM(path, plan=plan, nvme_dir=folder / "nvme-streamed", max_model_len=512) as llm:
            decode_rate(llm, 4, 4, prompt_tokens=16)
            before = read_so_far(llm)
            decode_rate(llm, 4, 20, prompt_tokens=16)
            after = read_so_far(llm)
        passes = after[0] - before[0]
        a_pass = (after[1] - before[1]) / passes
        print(
            f"| {share:.0%} | {passes} | {streams} | {a_pass:.0f} | {a_pass / streams:.4f} |",
            flush=True,
        )
    print("\n(target: at most 1.02)")


def with_resident(plan: PartitionPlan, share: float) -> PartitionPlan:
    """The plan of one shard with this share of its layers' bytes on the device, the rest on NVMe.

    (The planner itself would not stream the last tenth: its ring would take as much memory.)
    """
    (shard,) = plan.shards
    layers = [p for p in shard.placements if p.unit.endswith((".attention", ".mlp"))]
    left = share * sum(p.num_bytes for p in layers)
    tiers = {}
    for placement in layers:
        left -= placement.num_bytes
        tiers[placement.unit] = Tier.DEVICE if left >= 0 else Tier.NVME
    placements = tuple(replace(p, tier=tiers.get(p.unit, p.tier)) for p in shard.placements)
    budget = replace(shard.budget, device_bytes=BUDGET)
    shard = replace(shard, placements=placements, budget=budget)
    return replace(plan, stages=(replace(plan.stages[0], shards=(shard,)),))


def read_so_far(llm: LLM, kind: str = "weights") -> tuple[int, int]:
    """Passes so far, and the bytes of that kind read from NVMe."""
    (shard,) = llm.stats()["shards"]
    links = [link for link in shard["links"] if link["source"] == "nvme"]
    return shard["passes"], sum(link["bytes"] for link in links if link["kind"] == kind)


def write_mixture(folder: Path) -> Path:
    """A bf16 Qwen3-MoE shape of 1.8 GB, nearly all of it experts; written once."""
    path = folder / "qwen3-moe-1.8gb"
    if not (path / "config.json").exists():
        config = transformers.Qwen3MoeConfig(**MIXTURE, dtype="bfloat16")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
    return path


def experts(folder: Path, rounds: int) -> None:
    """Decode passes of a mixture whose experts lie on NVMe."""
    path = write_mixture(folder)
    profile = ModelProfile.from_pretrained(path)
    routed = sum(
        spec.num_elements * spec.dtype_bytes
        for unit in profile.units
        for spec in unit.parameters
        if profile.is_routed(spec)
    )
    print(header("Experts on NVMe"))
    print(
        f"{profile.num_bytes / 1e9:.2f} GB of weights, {routed / 1e9:.2f} GB of them experts; ",
        end="",
    )
    print(f"{MIXTURE['num_experts_per_tok']} of {MIXTURE['num_experts']} for a token\n")
    print("| batch | experts needed | read a pass MB | expected MB | decode pass s | forecast s |")
    print("|---|---|---|---|---|---|")
    for batch in (1, 4, 16, 64):
        options = {
            "device_memory": MIXTURE_DEVICE,
            "host_memory": 0,
            "max_model_len": 64,
            "max_num_seqs": batch,
            "prompt_tokens": 16,
            "output_tokens": 16,
            "concurrency": batch,
        }
        with LLM(path, nvme_dir=folder / "nvme-experts", **options) as llm:
            llm.generate(prompts(64, 48), SamplingParams(max_tokens=1))  # first reads are checked
            passes, read = [], []
            for _ in range(rounds):
                before = read_so_far(llm)
                rate, _ = decode_rate(llm, batch, 16, prompt_tokens=16)
                after = read_so_far(llm)
                passes.append(batch / rate)
                read.append((after[1] - before[1]) / (after[0] - before[0]) / 1e6)
            forecast = llm.plan.forecast.decode_pass_s
            streams = sum(
                p.num_bytes
                for p in llm.plan.shards[0].placements
                if p.tier is Tier.NVME and p.unit != "embedding"
            )
        share = profile.streamed_expert_share(batch)
        expected = streams - (1 - share) * routed
        print(
            f"| {batch} | {share:.0%} | {spread(read, 0)} | {expected / 1e6:.0f} "
            f"| {spread(passes)} | {forecast:.3f} |",
            flush=True,
        )
