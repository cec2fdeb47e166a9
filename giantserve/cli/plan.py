"""``giantserve plan``: what the planner would do, and what it says it will cost."""

from __future__ import annotations

from typing import Annotated

import typer

from giantserve.cli import engine_options as opt
from giantserve.options import engine_config


def plan(
    model: opt.Model,
    json_output: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
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
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Show where a model's weights would lie and how fast it would run. Loads no weights."""
    config = engine_config(
        {
            "model": model,
            "device_memory": device_memory,
            "host_memory": host_memory,
            "nvme_dir": nvme_dir,
            "nvme_memory": nvme_memory,
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "expert_parallel": expert_parallel,
            "threads_per_shard": threads_per_shard,
            "dtype": dtype,
            "device": device,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "trust_remote_code": trust_remote_code,
        }
    )

    from giantserve.cli.plan_table import print_plan
    from giantserve.planning import plan_for

    made = plan_for(config)
    if json_output:
        typer.echo(made.to_json())
    else:
        print_plan(made)
