"""``giantserve serve``: hands over to the Ray Serve deployment."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from giantserve.cli import engine_options as opt
from giantserve.options import engine_config
from giantserve.units import parse_bytes

LISTEN = "Listening"


def serve(
    model: opt.Model,
    host: Annotated[str, typer.Option(rich_help_panel=LISTEN)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, rich_help_panel=LISTEN)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="GIANTSERVE_API_KEY", help="Required of clients.", rich_help_panel=LISTEN
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in the API.", rich_help_panel=LISTEN)
    ] = None,
    max_body: Annotated[
        str, typer.Option(help="Largest request body.", rich_help_panel=LISTEN)
    ] = "4MiB",
    num_replicas: Annotated[int, typer.Option(min=1, help="Engines side by side.")] = 1,
    address: Annotated[
        str, typer.Option(help="Ray cluster to join; 'local' starts one here.")
    ] = "local",
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
    max_queued_requests: Annotated[
        int, typer.Option(min=1, help="More wait in vain: 429.", rich_help_panel=opt.LIMITS)
    ] = 1024,
    block_size: opt.BlockSize = None,
    prefix_caching: opt.PrefixCaching = True,
    trust_remote_code: opt.TrustRemoteCode = False,
    seed: opt.Seed = 0,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, on Ray Serve."""
    engine = {
        "served_model_name": served_model_name,
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
        "max_queued_requests": max_queued_requests,
        "block_size": block_size,
        "enable_prefix_caching": prefix_caching,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
    }
    engine_config({"model": model, **engine})
    options = {**engine, "num_replicas": num_replicas, "max_body_bytes": parse_bytes(max_body)}
    command = [sys.executable, "-m", "deployments", model]
    command += [f"{name}={value}" for name, value in options.items() if value is not None]
    command += [f"--host={host}", f"--port={port}", f"--address={address}"]
    if api_key is not None:
        os.environ["GIANTSERVE_API_KEY"] = api_key
    os.execv(sys.executable, command)
