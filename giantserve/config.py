"""The options of an engine. ``None`` means: the planner chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that shapes one engine (one replica). Memory is in bytes, per shard.

    ``layer_split`` is the number of layers of each pipeline stage.
    ``prompt_tokens`` to ``tpot_limit_s`` are what the planner is to expect, a `partition.Workload`;
    ``objective`` is the name of a `partition.Objective`: what its plan is to be best at.
    ``kv_storage_dtype`` is how KV lies on host and NVMe: as it is ("auto"), or in one byte an
    element, "int8" or "fp8", which loses accuracy; of several ("auto,fp8") the planner takes the
    fastest.
    ``prefix_memory`` is NVMe for cached prefixes, which then outlive the engine;
    ``tenant_prefix_share`` is how much of each tier the cached prefixes of one tenant may fill.
    ``storage_backend`` is "posix", "deepnvme" or the faster ("auto").
    ``exact_attention``: attend as transformers' own do, to the bit, and leave its norms and MLPs to
    torch, so that on a CPU bf16 answers, too, are the same; decode attention takes several times as
    long (docs/architecture.md).
    ``allow_unused_tiers``: a tier that is asked for, by its memory or its folder, but holds nothing
    is no error, as where one config serves models and machines of many sizes.
    ``seed``: sequences that draw tokens and bring no seed of their own draw the same ones at every
    start, in the order in which they come; None: others each time.
    ``trace`` is a file that the engine's end writes: what moved and what computed when.
    """

    model: str
    device_memory: int | None = None
    host_memory: int | None = None
    nvme_dir: Path | None = None
    nvme_memory: int | None = None
    prefix_memory: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    expert_parallel: bool | None = None
    layer_split: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    concurrency: int | None = None
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None
    objective: str | None = None
    executor: str = "local"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    kv_storage_dtype: str = "auto"
    enable_prefix_caching: bool = True
    tenant_prefix_share: float = 1.0
    max_queued_requests: int = 1024
    served_model_name: str | None = None
    trust_remote_code: bool = False
    seed: int | None = None
    threads_per_shard: int | None = None
    trace: Path | None = None
    storage_backend: str = "auto"
    exact_attention: bool = False
    allow_unused_tiers: bool = False
