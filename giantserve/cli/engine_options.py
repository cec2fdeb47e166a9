"""The options that shape an engine, as the commands share them.

Sizes are text: ``2GiB``, ``500MB``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLACE = "Memory and parallelism (all left out: the planner decides)"
LIMITS = "Limits"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint folder (Hugging Face format).")
]
DeviceMemory = Annotated[
    str | None, typer.Option(help="Device bytes per shard, e.g. 2GiB.", rich_help_panel=PLACE)
]
HostMemory = Annotated[
    str | None, typer.Option(help="Host bytes per shard, e.g. 4GiB.", rich_help_panel=PLACE)
]
NvmeDir = Annotated[
    Path | None,
    typer.Option(help="Folder on the disk for what fits nowhere else.", rich_help_panel=PLACE),
]
NvmeMemory = Annotated[
    str | None, typer.Option(help="Disk bytes per shard, e.g. 200GiB.", rich_help_panel=PLACE)
]
TensorParallel = Annotated[
    int | None, typer.Option(min=1, help="Shards per layer.", rich_help_panel=PLACE)
]
PipelineParallel = Annotated[
    int | None, typer.Option(min=1, help="Stages, each a run of layers.", rich_help_panel=PLACE)
]
ExpertParallel = Annotated[
    bool | None,
    typer.Option(
        "--expert-parallel/--no-expert-parallel",
        help="Deal whole experts out to a layer's shards, or cut each.",
        rich_help_panel=PLACE,
    ),
]
ThreadsPerShard = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of a shard.", rich_help_panel=PLACE)
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(min=1, help="Longest prompt plus answer, tokens.", rich_help_panel=LIMITS),
]
MaxNumSeqs = Annotated[
    int | None, typer.Option(min=1, help="Sequences in a pass.", rich_help_panel=LIMITS)
]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a pass.", rich_help_panel=LIMITS)
]
BlockSize = Annotated[int | None, typer.Option(min=1, help="Tokens in a block of KV.")]
PrefixCaching = Annotated[
    bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse KV of equal prefixes.")
]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code found in the checkpoint.")]
Seed = Annotated[int, typer.Option(help="Seed of requests that bring none.")]
