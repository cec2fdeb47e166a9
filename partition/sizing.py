"""How many tokens, sequences and KV blocks a replica is sized for, before weights are placed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol, TypedDict

import numpy as np

from kvcache.layout import DTYPE_BYTES, KVLayout
from kvcache.micro_batch import CHUNK_BYTES, NUM_BUFFERS
from kvcache.tier import TierBudget
from partition.cost import Array, PassShape, page_rounded
from partition.errors import PlanError
from partition.pass_tokens import NO_ROOM, ActivationRoom, activation_room
from partition.profile import ModelProfile
from partition.workload import Constraints, Workload

WORKSPACE_SHARE = 6
HOST_KV_SHARE = 4
MIN_BATCHED_TOKENS, MAX_BATCHED_TOKENS = 64, 2048
MAX_NUM_SEQS = 64
LEAST_MODEL_LEN = 64
ROTATION_SHARE = 16
STORED_PIECE_SLACK = 8
"""Bytes by which the part of a stored piece that one rank holds may exceed its share."""
DEVICE_KV_PARTS = (2, 4, 16)
"""With rotation, the device holds one of so many parts of the blocks, or more where it has room."""


class StoredPieces(NamedTuple):
    """A layer's part of a block, of the kind of layer that caches most: its pages on the device and
    on NVMe, and what a byte becomes on the host and, in whole pages, on NVMe, at most."""

    device_piece_bytes: int
    nvme_piece_bytes: int
    host_share: float
    nvme_share: float


@lru_cache(maxsize=64)
def _stored_pieces(kinds: KVLayout) -> StoredPieces:
    each = range(len(kinds.layers))
    pieces = [(kinds.piece(kind).num_bytes, kinds.stored_piece(kind).num_bytes) for kind in each]
    caching = [(held, stored) for held, stored in pieces if held]
    return StoredPieces(
        device_piece_bytes=max((page_rounded(held) for held, _ in caching), default=0),
        nvme_piece_bytes=max((page_rounded(stored) for _, stored in caching), default=0),
        host_share=max((stored / held for held, stored in caching), default=1.0),
        nvme_share=max((page_rounded(stored) / held for held, stored in caching), default=1.0),
    )


def stored_pieces(profile: ModelProfile, block_size: int, storage_dtype: str) -> StoredPieces:
    """What becomes of KV in this storage dtype."""
    return _stored_pieces(
        KVLayout(
            layers=profile.kv_layer_kinds,
            block_size=block_size,
            dtype=profile.dtype,
            storage_dtype=storage_dtype,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Token and block counts common to all shards. ``kv_share`` is the part of the device budget
    left after workspace and ring that KV may take while weights stream; None: as much as the blocks
    need. ``num_decoding`` sequences of the workload's length find room together. Rotating blocks
    pass through ``num_rotation_slots`` of a buffer; those that belong on NVMe are among
    ``num_tail_blocks`` on the host until they are full. Below the device they lie as ``stored``, in
    ``kv_storage_dtype``. A layer computes ``max_slice_tokens`` of a pass at a time; ``activations``
    is where the others wait. ``attends_on_host``: KV on the host stays there, and the host's cores
    attend to it."""

    block_size: int
    num_device_blocks: int
    num_host_blocks: int
    max_model_len: int
    max_num_seqs: int
    num_decoding: int
    max_num_batched_tokens: int
    max_slice_tokens: int
    workspace_bytes: int
    kv_share: float | None
    num_rotating_host_blocks: int = 0
    num_rotating_nvme_blocks: int = 0
    num_rotation_slots: int = 0
    num_tail_blocks: int = 0
    stored: StoredPieces
    kv_storage_dtype: str = "auto"
    activations: ActivationRoom = NO_ROOM
    attends_on_host: bool = False

    @property
    def num_active_blocks(self) -> int:
        """Blocks for running sequences, wherever they lie."""
        beyond = self.num_rotating_host_blocks + self.num_rotating_nvme_blocks
        return self.num_device_blocks + beyond

    def stored_bytes(self, block_bytes: Array, num_layers: Array) -> Array:
        """What a block takes below the device at most, of so many layers."""
        if self.stored.host_share == 1:
            return np.asarray(block_bytes)
        return np.ceil(block_bytes * self.stored.host_share + STORED_PIECE_SLACK * num_layers)

    def needs_landing(self, staged: bool) -> bool:
        """Whether blocks cannot be read to where they are attended to."""
        return self.num_rotation_slots > 0 and (staged or self.kv_storage_dtype != "auto")

    @property
    def landing_bytes(self) -> int:
        """Of the host's budget, for the buffers that blocks reach the device through where it
        cannot be read into, or has another dtype."""
        return NUM_BUFFERS * self.num_rotation_slots * self.stored.nvme_piece_bytes

    @property
    def rotation_bytes(self) -> int:
        """Of the device's budget, for the buffers through which blocks rotate."""
        return NUM_BUFFERS * self.num_rotation_slots * self.stored.device_piece_bytes


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
    budget: TierBudget,
    width: int,
    stages: int,
    workload: Workload,
    constraints: Constraints,
) -> Iterator[Sizing]:
    """The sizings worth trying on devices of which the smallest has ``budget``, for models cut into
    so many stages: most sequences and KV first (the workload's need), then halved down to the
    least; last those whose KV lies partly beyond the device, in each storage dtype allowed."""
    for storage_dtype in constraints.kv_storage_dtypes:
        fixed = replace(constraints, kv_storage_dtypes=(storage_dtype,))
        rotating_only = storage_dtype != constraints.kv_storage_dtypes[0]
        yield from _sizings(profile, budget, width, stages, workload, fixed, rotating_only)


def _sizings(
    profile: ModelProfile,
    budget: TierBudget,
    width: int,
    stages: int,
    workload: Workload,
    constraints: Constraints,
    rotating_only: bool,
) -> Iterator[Sizing]:
    """The sizings of one storage dtype, or those of them alone whose KV lies partly beyond the
    device."""
    (storage_dtype,) = constraints.kv_storage_dtypes
    least = least_sizing(profile, width, constraints)
    device_bytes = budget.device_bytes
    row_bytes = workspace_bytes(profile, width, 0, 1)
    num_seqs = constraints.max_num_seqs or max(
        1,
        min(
            max(MAX_NUM_SEQS, workload.concurrency),
            device_bytes // (2 * WORKSPACE_SHARE) // row_bytes,
        ),
    )
    asked = constraints.max_num_batched_tokens
    num_tokens = asked or MAX_BATCHED_TOKENS
    while (
        num_tokens > MIN_BATCHED_TOKENS
        and workspace_bytes(profile, width, num_tokens, num_seqs) > device_bytes // WORKSPACE_SHARE
    ):
        num_tokens //= 2
    tokens = asked or workload.concurrency * workload.prompt_tokens
    activations = activation_room(profile, budget, num_tokens, tokens)
    if asked is not None and activations.max_tokens < asked:
        num_tokens, activations = asked, NO_ROOM
    num_seqs = min(num_seqs, num_tokens)
    limit = constraints.max_model_len or profile.max_position_embeddings
    context = min(workload.context, limit)
    wanted = constraints.max_num_seqs or min(num_seqs, workload.concurrency)
    whole = profile.kv_layout(
        0, profile.num_layers, constraints.block_size, storage_dtype=storage_dtype
    )
    block_bytes = max(1, whole.block_bytes // stages)
    stored_bytes = max(1, whole.stored_block_bytes // stages)
    host_blocks = budget.host_bytes // HOST_KV_SHARE // stored_bytes
    most = wanted * math.ceil(context / constraints.block_size)

    def sized(blocks: int, kv_share: float | None) -> Sizing:
        tokens = blocks * constraints.block_size
        fitting = max(1, min(num_seqs, tokens // context))
        held = min(constraints.max_num_seqs or fitting, num_tokens)
        return Sizing(
            block_size=constraints.block_size,
            num_device_blocks=blocks,
            num_host_blocks=min(host_blocks, blocks),
            max_model_len=min(limit, tokens),
            max_num_seqs=held,
            num_decoding=min(fitting, held),
            max_num_batched_tokens=asked or num_tokens,
            max_slice_tokens=num_tokens,
            activations=activations,
            workspace_bytes=workspace_bytes(profile, width, num_tokens, held),
            kv_share=kv_share,
            stored=stored,
            kv_storage_dtype=storage_dtype,
        )

    stored = stored_pieces(profile, constraints.block_size, storage_dtype)
    on_nvme_bytes = stored.nvme_piece_bytes * math.ceil(profile.num_layers / stages)
    for_prefixes = (constraints.prefix_memory or 0) // on_nvme_bytes
    longest = math.ceil((constraints.max_model_len or context) / constraints.block_size)
    slots = max(
        longest, device_bytes // ROTATION_SHARE // (NUM_BUFFERS * stored.device_piece_bytes)
    )

    def rotating(made: Sizing) -> Sizing:
        used = min(slots, made.num_active_blocks)
        return replace(
            made,
            max_model_len=min(made.max_model_len, used * constraints.block_size),
            num_rotation_slots=used,
        )

    blocks = most
    while not rotating_only:
        blocks = max(blocks, least.num_device_blocks)
        made = sized(blocks, 0.5 if blocks > least.num_device_blocks else None)
        if for_prefixes:
            made = rotating(replace(made, num_rotating_nvme_blocks=for_prefixes))
        yield made
        if blocks == least.num_device_blocks:
            break
        blocks //= 2
    host_room = budget.host_bytes // 2
    nvme_room = budget.nvme_bytes // 2 // on_nvme_bytes
    for part in DEVICE_KV_PARTS:
        on_device = max(least.num_device_blocks, most // part)
        beyond = max(0, most - on_device)
        beyond_host = beyond * stored_bytes > host_room and nvme_room > 0
        tails = min(wanted, host_room // block_bytes) if beyond_host else 0
        on_host = min(beyond, (host_room - tails * block_bytes) // stored_bytes)
        on_nvme = min(beyond - on_host, nvme_room)
        total = on_device + on_host + on_nvme
        if total < longest or total == on_device:
            continue
        made = replace(
            sized(total, 0.5),
            num_device_blocks=on_device,
            num_host_blocks=min(
                host_blocks,
                (budget.host_bytes - tails * block_bytes) // stored_bytes - on_host,
            )
            // 2,
            num_rotating_host_blocks=on_host,
            num_rotating_nvme_blocks=on_nvme + for_prefixes,
            num_tail_blocks=tails,
        )
        yield rotating(made)
        if on_host and storage_dtype == "auto":
            yield replace(rotating(made), attends_on_host=True)


def least_sizing(profile: ModelProfile, width: int, constraints: Constraints) -> Sizing:
    """The smallest sizing that the constraints allow: if it does not fit, nothing does."""
    num_tokens = constraints.max_num_batched_tokens or MIN_BATCHED_TOKENS
    limit = constraints.max_model_len or min(profile.max_position_embeddings, LEAST_MODEL_LEN)
    blocks = math.ceil(limit / constraints.block_size)
    num_seqs = min(constraints.max_num_seqs or 1, num_tokens)
    storage_dtype = constraints.kv_storage_dtypes[0]
    return Sizing(
        block_size=constraints.block_size,
        num_device_blocks=blocks,
        num_host_blocks=0,
        max_model_len=min(
            constraints.max_model_len or profile.max_position_embeddings,
            blocks * constraints.block_size,
        ),
        max_num_seqs=num_seqs,
        num_decoding=num_seqs,
        max_num_batched_tokens=num_tokens,
        max_slice_tokens=num_tokens,
        workspace_bytes=workspace_bytes(profile, width, num_tokens, num_seqs),
        kv_share=None,
        stored=stored_pieces(profile, constraints.block_size, storage_dtype),
        kv_storage_dtype=storage_dtype,
    )


def batch_size(sizing: Sizing, workload: Workload) -> int:
    """Sequences that decode together."""
    return min(workload.concurrency, sizing.num_decoding)


def decode_shape(sizing: Sizing, workload: Workload, passes: int) -> PassShape:
    """One of the ``passes`` in flight, halfway through the workload's outputs."""
    batch = batch_size(sizing, workload)
    per_pass = math.ceil(batch / passes)
    context = min(workload.prompt_tokens + workload.output_tokens / 2, sizing.max_model_len)
    return PassShape(
        num_tokens=per_pass,
        num_sequences=per_pass,
        context=context,
        **rotation_load(sizing, batch, context, passes, sizing.stored),
    )


class Rotating(Protocol):
    """What a `Sizing` and a plan say of blocks that rotate."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_device_blocks(self) -> int: ...
    @property
    def num_rotating_host_blocks(self) -> int: ...
    @property
    def num_rotation_slots(self) -> int: ...
    @property
    def num_tail_blocks(self) -> int: ...
    @property
    def kv_storage_dtype(self) -> str: ...
    @property
    def attends_on_host(self) -> bool: ...


class RotationLoad(TypedDict):
    """The fields of a `PassShape` that say what rotates."""

    host_kv: float
    nvme_kv: float
    attended_kv: float
    micro_batches: int
    written: float
    rewritten: float
    host_share: float
    nvme_share: float
    storage_dtype: str
    kv_read_bytes: float
    kv_write_bytes: float


def rotation_load(
    sized: Rotating, batch: int, context: float, passes: int, stored: StoredPieces
) -> RotationLoad:
    """What rotates where ``batch`` sequences of ``context`` tokens are dealt out over so many
    passes: blocks on the device and on the host are filled first. A block of NVMe that is not full
    is written back whole, or waits in a tail row. A sequence's blocks are neighbours on NVMe, and
    are written one by one."""
    of_a_sequence = math.ceil(context / sized.block_size)
    used = batch * of_a_sequence
    beyond = max(0, used - sized.num_device_blocks)
    host = min(beyond, sized.num_rotating_host_blocks)
    stays = host if sized.attends_on_host else 0
    of_a_pass = math.ceil(used / passes) * (beyond - stays)
    waiting = min(1.0, sized.num_tail_blocks / batch)
    return RotationLoad(
        host_kv=(host - stays) / used,
        attended_kv=stays / used,
        nvme_kv=(beyond - host) / used,
        micro_batches=-(-of_a_pass // (used * max(1, sized.num_rotation_slots))),
        written=waiting + (1 - waiting) * sized.block_size,
        rewritten=float(sized.block_size),
        host_share=stored.host_share,
        nvme_share=stored.nvme_share,
        storage_dtype=sized.kv_storage_dtype,
        kv_read_bytes=min(CHUNK_BYTES, of_a_sequence * stored.nvme_piece_bytes),
        kv_write_bytes=stored.nvme_piece_bytes,
    )


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
    split = constraints.layer_split
    if split is not None and sum(split) != layers:
        raise PlanError(
            f"layer_split is {', '.join(map(str, split))}, {sum(split)} layers in all, but the "
            f"model has {layers}; make them add up"
        )
    if split is not None and constraints.pipeline_parallel not in (None, len(split)):
        raise PlanError(
            f"pipeline_parallel is {constraints.pipeline_parallel}, but layer_split names "
            f"{len(split)} stages; leave pipeline_parallel out"
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
