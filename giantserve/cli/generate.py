"""``giantserve generate``: offline, in this process, without Ray."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from giantserve.cli import engine_options as opt
from giantserve.options import parse_options
from giantserve.units import parse_bytes


def generate(
    model: opt.Model,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    stats: Annotated[bool, typer.Option(help="Print the engine's statistics, too.")] = False,
    device_memory: opt.DeviceMemory = None,
    host_memory: opt.HostMemory = None,
    nvme_dir: opt.NvmeDir = None,
    nvme_memory: opt.NvmeMemory = None,
    tensor_parallel: opt.TensorParallel = None,
    pipeline_parallel: opt.PipelineParallel = None,
    expert_parallel: opt.ExpertParallel = None,
    threads_per_shard: opt.ThreadsPerShard = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Complete prompts offline and print the texts."""
    sizes = {"device_memory": device_memory, "host_memory": host_memory, "nvme_memory": nvme_memory}
    options = parse_options(sizes, dict.fromkeys(sizes, parse_bytes))

    from giantserve import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with LLM(
        model,
        nvme_dir=nvme_dir,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        threads_per_shard=threads_per_shard,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        trust_remote_code=trust_remote_code,
        **options,
    ) as llm:
        for text, output in zip(prompt, llm.generate(prompt, params), strict=True):
            if json_output:
                reason = output.finish_reason
                answer = {"prompt": text, "text": output.text, "finish_reason": reason}
                typer.echo(json.dumps(answer))
            else:
                typer.echo(text + output.text)
        if stats:
            typer.echo(json.dumps(llm.stats(), indent=2, default=str))
