"""Prompts through a model whose weights stream: passes of many slices against passes of one.

    python bench/activations.py

The disk is throttled, so that a pass takes several times what computing one slice does, as it is
with a giant on a real one. Both plans are the planner's, but for the tokens of a pass; the ceiling
is reading the weights once for every pass that has as many tokens as compute meanwhile.
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from planner_case import Machine
from report import header, spread
from shapes import write_checkpoint
from throttle import Throttle

from giantserve import LLM, SamplingParams
from kvcache.tier import Tier, TierBudget
from partition import Constraints, ModelProfile, PartitionPlan, Workload, plan

SHAPE, DISK_BYTES_PER_S = "llama-0.8gb", 1e8
PROMPTS, PROMPT_TOKENS, VOCAB = 24, 512, 8192
DEVICE_BYTES, HOST_BYTES = 384 << 20, 256 << 20


def plans(path: Path, folder: Path) -> dict[str, PartitionPlan]:
    """Most of the weights on a slow disk: by slices, and with passes of one."""
    profile = ModelProfile.from_pretrained(path)
    budget = TierBudget(
        device_bytes=DEVICE_BYTES, host_bytes=HOST_BYTES, nvme_bytes=2 * profile.num_bytes
    )
    made = plan(
        profile,
        Machine(folder).cluster([budget], (DISK_BYTES_PER_S,)),
        Workload(prompt_tokens=PROMPT_TOKENS, output_tokens=1, concurrency=PROMPTS),
        constraints=Constraints(max_num_seqs=PROMPTS, max_model_len=PROMPT_TOKENS + 1),
        model=str(path),
    )
    return {
        "slices": made,
        "one slice": replace(made, max_num_batched_tokens=made.max_slice_tokens),
    }


def prompts() -> list[list[int]]:
    """Distinct random prompts, so that no prefix is shared."""
    draw = random.Random(time.time_ns())
    return [[draw.randrange(3, VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]


def main() -> None:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(".bench"), help="where checkpoints are kept"
    )
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder.absolute()
    path = write_checkpoint(SHAPE, folder)
    nvme_dir = folder / "nvme"
    made = plans(path, folder)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    passes: dict[str, int] = {}
    tokens: dict[str, list[list[int]]] = {}
    fixed = prompts()
    with ExitStack() as opened:
        engines = {
            name: opened.enter_context(LLM(path, plan=each, nvme_dir=nvme_dir))
            for name, each in made.items()
        }
        for name, llm in engines.items():
            (pid,) = llm._engine._executor.worker_pids  # type: ignore[attr-defined]
            opened.enter_context(Throttle(name.split()[0], pid, nvme_dir, DISK_BYTES_PER_S))
        for turn in range(options.rounds):
            for name, llm in engines.items():
                before = llm.stats()["passes"]
                begin = time.perf_counter()
                given = fixed if turn == 0 else prompts()
                outputs = llm.generate(given, params)
                seconds[name].append(time.perf_counter() - begin)
                if turn == 0:
                    tokens[name] = [output.token_ids for output in outputs]
                    passes[name] = llm.stats()["passes"] - before
    print(header("Passes of many slices"))
    shard = made["slices"].shards[0]
    on_disk = shard.weight_bytes(Tier.NVME)
    print(
        f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens; {on_disk / 1e9:.2f} GB of weights on a disk "
        f"throttled to {DISK_BYTES_PER_S / 1e6:.0f} MB/s: {on_disk / DISK_BYTES_PER_S:.2f} s a "
        "pass\n"
    )
    print("| a pass has | passes | prompts' tokens/s: median (range) |")
    print("|---|---|---|")
    total = PROMPTS * PROMPT_TOKENS
    for name, each in made.items():
        rates = [total / found for found in seconds[name]]
        print(
            f"| up to {each.max_num_batched_tokens} tokens in slices of {each.max_slice_tokens} "
            f"| {passes[name]} | {spread(rates, 0)} |"
        )
    ratios = [b / a for a, b in zip(seconds["slices"], seconds["one slice"], strict=True)]
    same = sum(a == b for a, b in zip(tokens["slices"], tokens["one slice"], strict=True))
    print(
        f"\nslices are {spread(ratios, 2)} times as fast; the first token is the same for {same} "
        f"of {PROMPTS} prompts; states wait in {shard.host_activation_bytes / 1e6:.0f} MB on the "
        f"host and {shard.nvme_activation_bytes / 1e6:.0f} MB on NVMe"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
