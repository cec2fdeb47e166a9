"""How many tokens, sequences and KV blocks a replica is sized for, before weights are placed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kvcache.layout import DTYPE_BYTES
from partition.cost import PassShape
from partition.errors import PlanError
from partition.profile import ModelProfile
from partition.workload import Constraints, Workload

WORKSPACE_SHARE = 6
HOST_KV_SHARE = 4
MIN_BATCHED_TOKENS, MAX_BATCHED_TOKENS = 64, 2048
MAX_NUM_SEQS = 64
LEAST_MODEL_LEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Token and block counts common to all shards. ``kv_share`` is the part of the device budget
    left after workspace and ring that KV may take while weights stream; None: as much as the blocks
    need."""

    num_device_blocks: int
    num_host_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    workspace_bytes: int
    kv_share: float | None


def workspace_bytes(
    profile: ModelProfile, width: int, num_tokens: int, num_sampled_rows: int
) -> int:
    """Activations of a pass: residual, norm and attention inputs and outputs, a unit's widest
    products (``width`` elements a token), and the sampled rows' logits with their fp32 copy and
    probabilities."""
    element = DTYPE_BYTES[profile.dtype]
    per_token = (6 * profile.hidden_size + width) * element
    return num_tokens * per_token + num_sampled_rows * profile.vocab_size * (element + 8)


def sizings(
    profile: ModelProfile,
    device_bytes: int,
    host_bytes: int,
    width: int,
    stage_block_bytes: int,
    workload: Workload,
    constraints: Constraints,
) -> Iterator[Sizing]:
    """The sizings worth trying on devices of which the smallest has ``device_bytes`` and
    ``host_bytes``, for stages that hold ``stage_block_bytes`` a KV block: most sequences and KV
    first (the workload's need), then halved down to the least."""
    least = least_sizing(profile, width, constraints)
    row_bytes = workspace_bytes(profile, width, 0, 1)
    num_seqs = constraints.max_num_seqs or max(
        1,
        min(
            max(MAX_NUM_SEQS, workload.concurrency),
            device_bytes // (2 * WORKSPACE_SHARE) // row_bytes,
        ),
    )
    num_tokens = constraints.max_num_batched_tokens or MAX_BATCHED_TOKENS
    while (
        constraints.max_num_batched_tokens is None
        and num_tokens > MIN_BATCHED_TOKENS
        and workspace_bytes(profile, width, num_tokens, num_seqs) > device_bytes // WORKSPACE_SHARE
    ):
        num_tokens //= 2
    num_seqs = min(num_seqs, num_tokens)
    limit = constraints.max_model_len or profile.max_position_embeddings
    context = min(workload.context, limit)
    wanted = constraints.max_num_seqs or min(num_seqs, workload.concurrency)
    blocks = wanted * math.ceil(context / constraints.block_size)
    host_blocks = host_bytes // HOST_KV_SHARE // max(1, stage_block_bytes)
    while True:
        blocks = max(blocks, least.num_device_blocks)
        tokens = blocks * constraints.block_size
        held = constraints.max_num_seqs or max(1, min(num_seqs, tokens // context))
        yield Sizing(
            num_device_blocks=blocks,
            num_host_blocks=min(host_blocks, blocks),
            max_model_len=min(limit, tokens),
            max_num_seqs=min(held, num_tokens),
            max_num_batched_tokens=num_tokens,
            workspace_bytes=workspace_bytes(profile, width, num_tokens, min(held, num_tokens)),
            kv_share=0.5 if blocks > least.num_device_blocks else None,
        )
        if blocks == least.num_device_blocks:
            return
        blocks //= 2


def least_sizing(profile: ModelProfile, width: int, constraints: Constraints) -> Sizing:
    """The smallest sizing that the constraints allow: if it does not fit, nothing does."""
    num_tokens = constraints.max_num_batched_tokens or MIN_BATCHED_TOKENS
    limit = constraints.max_model_len or min(profile.max_position_embeddings, LEAST_MODEL_LEN)
    blocks = math.ceil(limit / constraints.block_size)
    num_seqs = min(constraints.max_num_seqs or 1, num_tokens)
    return Sizing(
        num_device_blocks=blocks,
        num_host_blocks=0,
        max_model_len=min(
            constraints.max_model_len or profile.max_position_embeddings,
            blocks * constraints.block_size,
        ),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        workspace_bytes=workspace_bytes(profile, width, num_tokens, num_seqs),
        kv_share=None,
    )


def batch_size(sizing: Sizing, workload: Workload) -> int:
    """Sequences that decode together."""
    return min(workload.concurrency, sizing.max_num_seqs)


def decode_shape(sizing: Sizing, workload: Workload, passes: int) -> PassShape:
    """One of the ``passes`` in flight, halfway through the workload's outputs."""
    per_pass = math.ceil(batch_size(sizing, workload) / passes)
    context = min(workload.prompt_tokens + workload.output_tokens / 2, sizing.max_model_len)
    return PassShape(num_tokens=per_pass, num_sequences=per_pass, context=context)


def prefill_shape(sizing: Sizing, workload: Workload) -> PassShape:
    """One of the passes that together read a prompt."""
    prompt = min(workload.prompt_tokens, sizing.max_model_len)
    tokens = min(prompt, sizing.max_num_batched_tokens)
    return PassShape(num_tokens=tokens, num_sequences=1, context=prompt / 2)


def num_prefill_passes(sizing: Sizing, workload: Workload) -> int:
    """How many passes a prompt takes."""
    prompt = min(workload.prompt_tokens, sizing.max_model_len)
    return math.ceil(prompt / min(prompt, sizing.max_num_batched_tokens))


def check_constraints(profile: ModelProfile, constraints: Constraints) -> None:
    """Raise PlanError where what the user fixed contradicts the model or itself."""
    fixed_len = constraints.max_model_len
    if fixed_len is not None and fixed_len > profile.max_position_embeddings:
        raise PlanError(
            f"max_model_len is {fixed_len}, but the model takes {profile.max_position_embeddings} "
            "positions; lower max_model_len"
        )
    seqs, tokens = constraints.max_num_seqs, constraints.max_num_batched_tokens
    if seqs is not None and tokens is not None and seqs > tokens:
        raise PlanError(
            f"max_num_seqs is {seqs}, but a pass takes max_num_batched_tokens = {tokens}, one per "
            "sequence at least; raise max_num_batched_tokens or lower max_num_seqs"
        )
    layers = profile.num_layers
    if constraints.pipeline_parallel is not None and constraints.pipeline_parallel > layers:
        raise PlanError(
            f"pipeline_parallel is {constraints.pipeline_parallel}, but the model has {layers} "
            f"layers; use at most {layers}"
        )
    if constraints.tensor_parallel is not None and not constraints.expert_parallel:
        refusal = profile.why_not_tensor_parallel(constraints.tensor_parallel)
        if refusal:
            raise PlanError(
                f"tensor_parallel is {constraints.tensor_parallel}, which this model does not "
                f"allow: {refusal}; use another degree, or pipeline_parallel"
            )
    if constraints.expert_parallel:
        refusal = profile.why_not_expert_parallel(constraints.tensor_parallel or 2)
        if refusal:
            raise PlanError(
                f"expert_parallel is true, which is not possible: {refusal}; leave it out, or use "
                "another tensor_parallel"
            )
