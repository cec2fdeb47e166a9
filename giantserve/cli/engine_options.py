"""The options that shape an engine, as the commands share them.

Sizes are text: ``2GiB``, ``500MB``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

PLACE = "Memory and parallelism (all left out: the planner decides)"
LOAD = "What to plan for"
LIMITS = "Limits"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint folder (Hugging Face format).")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Every shared option: its type, its help and its default. The names are `EngineConfig`'s."""

    device_memory: Annotated[
        str | None, typer.Option(help="Device bytes per shard, e.g. 2GiB.", rich_help_panel=PLACE)
    ] = None
    host_memory: Annotated[
        str | None, typer.Option(help="Host bytes per shard, e.g. 4GiB.", rich_help_panel=PLACE)
    ] = None
    nvme_dir: Annotated[
        Path | None,
        typer.Option(help="Folder on the disk for what fits nowhere else.", rich_help_panel=PLACE),
    ] = None
    nvme_memory: Annotated[
        str | None, typer.Option(help="Disk bytes per shard, e.g. 200GiB.", rich_help_panel=PLACE)
    ] = None
    prefix_memory: Annotated[
        str | None,
        typer.Option(
            help="Disk bytes per shard for cached prefixes, kept across restarts, e.g. 20GiB.",
            rich_help_panel=PLACE,
        ),
    ] = None
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Shards per layer.", rich_help_panel=PLACE)
    ] = None
    pipeline_parallel: Annotated[
        int | None, typer.Option(min=1, help="Stages, each a run of layers.", rich_help_panel=PLACE)
    ] = None
    expert_parallel: Annotated[
        bool | None,
        typer.Option(
            "--expert-parallel/--no-expert-parallel",
            help="Deal whole experts out to a layer's shards, or cut each.",
            rich_help_panel=PLACE,
        ),
    ] = None
    layer_split: Annotated[
        str | None,
        typer.Option(help="Layers of each stage, e.g. 5,6,11.", rich_help_panel=PLACE),
    ] = None
    threads_per_shard: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a shard.", rich_help_panel=PLACE)
    ] = None
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a typical prompt.", rich_help_panel=LOAD)
    ] = None
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a typical answer.", rich_help_panel=LOAD)
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at once.", rich_help_panel=LOAD)
    ] = None
    objective: Annotated[
        str | None,
        typer.Option(
            help="max_throughput, min_tpot, min_ttft or least_devices.", rich_help_panel=LOAD
        ),
    ] = None
    ttft_limit_s: Annotated[
        float | None,
        typer.Option(
            "--ttft-limit", help="Seconds to the first token, at most.", rich_help_panel=LOAD
        ),
    ] = None
    tpot_limit_s: Annotated[
        float | None,
        typer.Option(
            "--tpot-limit", help="Seconds per output token, at most.", rich_help_panel=LOAD
        ),
    ] = None
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto"
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Longest prompt plus answer, tokens.", rich_help_panel=LIMITS),
    ] = None
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a pass.", rich_help_panel=LIMITS)
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a pass.", rich_help_panel=LIMITS)
    ] = None
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens in a block of KV.")] = None
    kv_storage_dtype: Annotated[
        str,
        typer.Option(
            help="KV on host and disk: auto (as it is), int8 or fp8 (lossy); of several, such as "
            "auto,fp8, the planner takes the fastest."
        ),
    ] = "auto"
    storage_backend: Annotated[
        str, typer.Option(help="Reads weights from disk: posix, deepnvme, or auto, the faster.")
    ] = "auto"
    exact_attention: Annotated[
        bool,
        typer.Option(
            "--exact-attention",
            help="Attend to the bit as transformers does on a CPU, and leave norms and MLPs to "
            "torch, for the same bf16 answers; attention takes several times as long.",
        ),
    ] = False
    allow_unused_tiers: Annotated[
        bool,
        typer.Option(
            "--allow-unused-tiers",
            help="No error where host memory or a disk was asked for and is not needed.",
            rich_help_panel=PLACE,
        ),
    ] = False
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code found in the checkpoint.")
    ] = False


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command(..., engine)`` with all `EngineOptions` on its command line in place of ``engine``,
    which becomes a dict of them by name."""
    hints = get_type_hints(EngineOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=hints[option.name],
        )
        for option in fields(EngineOptions)
    ]
    own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        engine = {parameter.name: given.pop(parameter.name) for parameter in shared}
        command(**given, engine=engine)

    kept = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "engine"]
    run.__signature__ = inspect.Signature([*kept, *shared])  # type: ignore[attr-defined]
    return run
