"""A model much larger than the memory: the 14.5 GB Llama shape (32 layers x 4096) in a cgroup of
6 GiB, bf16.

python bench/big_model.py latency      batch 1: seconds a token of ours, of Accelerate's disk
                                       offload and, given --llama-bench, of llama.cpp's mmap
python bench/big_model.py throughput   256 requests of 64 in / 32 out: ours, as it is and with exact
                                       attention, and Accelerate's best batch by its prefill and
                                       decode passes

Each runs in a process of its own within the cgroup, in turns, the page cache dropped before.
llama.cpp needs its llama-bench, and the gguf package to write its file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from memory_box import MemoryBox
from report import header, spread
from shapes import SHAPES, write_checkpoint

from giantserve import LLM, SamplingParams

SHAPE = "llama-14.5gb"
LIMIT_BYTES = 6 << 30
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 256, 64, 32
LATENCY_PROMPT, LATENCY_TOKENS = 16, 5
ACCELERATE_MEMORY = {1: "3.5GiB", 8: "3GiB", 16: "3GiB", 32: "2GiB", 64: "1GiB"}
"""Of weights that stay, by batch; the rest of the 6 GiB is for its runtime, layers on their way,
activations and KV. With 4.5 GiB it is killed at batch 1; with 3 GiB it thrashes at batch 32: its
pages are dropped as fast as it reads them."""

TIME_LIMITS_S = {"accelerate": 300.0, "ours": 900.0, "ours, exact": 900.0}
DECODE_PASSES = 4


def ours(folder: Path, batch: int, *, exact_attention: bool = False) -> dict[str, Any]:
    """One engine, sized by the planner: seconds a decode pass at batch 1, else tokens/s."""
    long = batch > 1
    tokens = (PROMPT_TOKENS, OUTPUT_TOKENS) if long else (LATENCY_PROMPT, LATENCY_TOKENS)
    llm = LLM(
        folder / SHAPE,
        nvme_dir=folder / "nvme-big",
        max_model_len=sum(tokens),
        max_num_seqs=batch,
        prompt_tokens=tokens[0],
        output_tokens=tokens[1],
        concurrency=batch,
        objective="max_throughput" if long else "min_tpot",
        exact_attention=exact_attention,
    )
    params = SamplingParams(max_tokens=tokens[1], temperature=0.0, ignore_eos=True)
    with llm:
        begin = time.perf_counter()
        outputs = llm.generate(fixed_prompts(batch, tokens[0]), params)
        seconds = time.perf_counter() - begin
        forecast = llm.plan.forecast
    decode = [(o.latency_s - o.time_to_first_token_s) / (tokens[1] - 1) for o in outputs]
    return {
        "pass_s": statistics.median(decode),
        "tokens_per_s": batch * tokens[1] / seconds,
        "forecast_pass_s": forecast.decode_pass_s,
        "reason": llm.plan.reason,
        "tokens": [output.token_ids for output in outputs[:16]],
    }


@torch.inference_mode()
def accelerate(folder: Path, batch: int) -> dict[str, Any]:
    """transformers with Accelerate's disk offload: seconds of the prefill and of a decode pass."""
    long = batch > 1
    prompt, count = (PROMPT_TOKENS, DECODE_PASSES) if long else (LATENCY_PROMPT, LATENCY_TOKENS - 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / SHAPE,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": ACCELERATE_MEMORY[batch]},
        offload_folder=folder / "offload",
    ).eval()
    ids = torch.tensor(fixed_prompts(batch, prompt))
    begin = time.perf_counter()
    found = model(ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - begin
    times, tokens = [], [found.logits[:, -1].argmax(-1)]
    for _ in range(count):
        begin = time.perf_counter()
        found = model(tokens[-1][:, None], past_key_values=found.past_key_values, use_cache=True)
        tokens.append(found.logits[:, -1].argmax(-1))
        times.append(time.perf_counter() - begin)
    decode = statistics.median(times)
    total = prefill + (OUTPUT_TOKENS - 1) * decode
    return {
        "prefill_s": prefill,
        "pass_s": decode,
        "tokens_per_s": batch * OUTPUT_TOKENS / total,
        "tokens": torch.stack(tokens, 1)[:16].tolist(),
    }


def fixed_prompts(batch: int, num_tokens: int) -> list[list[int]]:
    """The same for every system."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, 32000, (batch, num_tokens), generator=generator).tolist()


CHILDREN = {
    "ours": ours,
    "ours, exact": partial(ours, exact_attention=True),
    "accelerate": accelerate,
}


def child(box: MemoryBox, folder: Path, name: str, batch: int) -> dict[str, Any]:
    """Run one system in the box; {"error": ...} where it ends badly."""
    command = [sys.executable, __file__, "child", f"--folder={folder}"]
    command += [f"--system={name}", f"--batch={batch}"]
    try:
        done = box.run(command, timeout=TIME_LIMITS_S[name])
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {TIME_LIMITS_S[name]:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"status {done.returncode}: {last[:200]}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def llama_cpp(box: MemoryBox, program: Path, gguf: Path) -> float:
    """Seconds a token of llama-bench, its weights mapped."""
    command = [str(program), "-m", str(gguf), "-p", "0", "-n", str(LATENCY_TOKENS - 1)]
    done = box.run([*command, "-r", "1", "-t", "2", "--no-warmup", "-lm", "mmap", "-o", "json"])
    if done.returncode:
        raise SystemExit(f"llama-bench failed: {done.stderr[-400:]}")
    return 1 / float(json.loads(done.stdout)[0]["avg_ts"])


def write_gguf(folder: Path) -> Path:
    """The checkpoint as a bf16 GGUF without a vocabulary; written once."""
    import gguf
    from safetensors import safe_open

    path = folder / f"{SHAPE}.gguf"
    if path.exists():
        return path
    shape = SHAPES[SHAPE]
    writer = gguf.GGUFWriter(path.with_suffix(".unfinished"), "llama")
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape["num_hidden_layers"])
    files = sorted((folder / SHAPE).glob("*.safetensors"))
    bf16 = gguf.GGMLQuantizationType.BF16
    for filling in (False, True):
        if filling:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for file in files:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_tensor(key)
                    wide = tensor.dim() == 1
                    data = tensor.float().numpy() if wide else tensor.view(torch.uint8).numpy()
                    if filling:
                        writer.write_tensor_data(data)
                        continue
                    name = names.get_name(key, try_suffixes=(".weight",))
                    assert name is not None, key
                    kind = None if wide else bf16
                    writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    writer.close()
    path.with_suffix(".unfinished").rename(path)
    return path


def latency(box: MemoryBox, folder: Path, rounds: int, program: Path | None) -> None:
    """Batch 1, in turns."""
    gguf = write_gguf(folder) if program else None
    print(header("A 14.5 GB model in 6 GiB, batch 1"))
    times: dict[str, list[float]] = {"ours": [], "accelerate": []}
    tokens: dict[str, list[list[int]]] = {}
    child(box, folder, "ours", 1)  # packs the store
    for _ in range(rounds):
        for name in times:
            found = child(box, folder, name, 1)
            if "error" in found:
                raise SystemExit(f"{name}: {found['error']}")
            times[name].append(found["pass_s"])
            tokens[name] = found["tokens"]
            if name == "ours":
                plan = f"{found['reason']}; forecast {found['forecast_pass_s']:.3f} s a pass"
        if program and gguf:
            times.setdefault("llama.cpp", []).append(llama_cpp(box, program, gguf))
    print(f"plan: {plan}\n")
    print("| system | s a token | of ours |")
    print("|---|---|---|")
    for name, found in times.items():
        ratios = [theirs / mine for theirs, mine in zip(found, times["ours"], strict=True)]
        print(f"| {name} | {spread(found)} | {spread(ratios, 2)} |")
    same = tokens["ours"] == tokens["accelerate"]
    print(f"\nsame tokens as Accelerate: {'yes' if same else 'no'} (target: at least 1.5x both)")


def throughput(box: MemoryBox, folder: Path, rounds: int, program: Path | None) -> None:
    """256 requests; Accelerate by batch."""
    print(header("A 14.5 GB model in 6 GiB, 256 requests of 64 in / 32 out"))
    print("| system | batch | prefill s | decode pass s | tokens/s |")
    print("|---|---|---|---|---|")
    best = 0.0
    tokens: dict[str, list[list[int]]] = {}
    for batch in list(ACCELERATE_MEMORY)[1:]:
        found = child(box, folder, "accelerate", batch)
        if "error" in found:
            print(f"| accelerate | {batch} | {found['error']} | | |", flush=True)
            break  # a larger batch takes longer, and more memory
        best = max(best, found["tokens_per_s"])
        tokens[f"Accelerate at batch {batch}"] = found["tokens"]
        cells = f"{found['prefill_s']:.1f} | {found['pass_s']:.2f} | {found['tokens_per_s']:.2f}"
        print(f"| accelerate | {batch} | {cells} |", flush=True)
    rates: dict[str, list[float]] = {"ours": [], "ours, exact": []}
    for name in list(rates) * rounds:
        found = child(box, folder, name, REQUESTS)
        if "error" in found:
            raise SystemExit(f"{name}: {found['error']}")
        rates[name].append(found["tokens_per_s"])
        tokens[name] = found["tokens"]
        print(f"| {name} | {REQUESTS} | | | {found['tokens_per_s']:.2f} |", flush=True)
    print(f"\nplan: {found['reason']}")
    print("ours mixes prompts and decodes in a pass, so neither has a time of its own\n")
    for name, mine in rates.items():
        ratio = statistics.median(mine) / best
        print(f"{name}: {ratio:.2f}x Accelerate at its best batch (target: 4x)")
    count = DECODE_PASSES + 1
    for (one, left), (other, right) in itertools.combinations(tokens.items(), 2):
        equal = [a[:count] == b[:count] for a, b in zip(left, right, strict=False)]
        print(f"same first {count} tokens, {one} and {other}: {sum(equal)} of {len(equal)}")


MODES = {"latency": latency, "throughput": throughput}


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mode", choices=(*MODES, "child"))
    parser.add_argument(
        "--folder", type=Path, default=Path(".bench"), help="where checkpoints are kept"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-bench", type=Path, help="the program, to compare with llama.cpp")
    parser.add_argument("--system", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.mode == "child":
        print(json.dumps(CHILDREN[options.system](folder, options.batch)))
        return
    try:
        box = MemoryBox(LIMIT_BYTES)
    except OSError as error:
        raise SystemExit(f"skipped: no memory cgroup can be made here: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(SHAPE, folder)
    with box:
        MODES[options.mode](box, folder, options.rounds, options.llama_bench)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
