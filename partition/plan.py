"""The planner's decision: the only thing the executor reads. Frozen, validated, versioned JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from kvcache.layout import STORAGE_DTYPES
from kvcache.tier import Tier, TierBudget
from partition.codec import decode, encode
from partition.errors import PlanError

PLAN_VERSION = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlacement:
    """Where one shard keeps one unit. ``num_bytes`` is the shard's own slice."""

    unit: str
    tier: Tier
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One rank: its stage, its place in the tensor-parallel group, and where its units lie.

    ``ring_bytes`` of the device budget are buffers through which non-resident units pass.
    ``device_kv_bytes``, ``host_kv_bytes`` and ``nvme_kv_bytes`` hold the KV blocks of those tiers;
    ``rotation_bytes`` of the device budget are the buffers through which blocks that lie elsewhere
    come to be attended to.
    ``workspace_bytes`` of the device budget are kept free for activations, ``staging_bytes`` of the
    host budget are the buffers through which NVMe units reach a device that cannot be read into.
    ``host_activation_bytes`` and ``nvme_activation_bytes`` hold hidden states between the layers of
    passes larger than a slice.
    ``node`` and ``device`` are the cluster's names of where it runs.
    """

    rank: int
    stage: int
    tp_rank: int
    budget: TierBudget
    placements: tuple[UnitPlacement, ...]
    ring_bytes: int
    device_kv_bytes: int
    host_kv_bytes: int
    workspace_bytes: int
    staging_bytes: int = 0
    nvme_kv_bytes: int = 0
    rotation_bytes: int = 0
    host_activation_bytes: int = 0
    nvme_activation_bytes: int = 0
    node: str = ""
    device: str = ""

    def weight_bytes(self, tier: Tier) -> int:
        """Bytes of weights this shard keeps on ``tier``."""
        return sum(p.num_bytes for p in self.placements if p.tier is tier)

    def used_bytes(self, tier: Tier) -> int:
        """Bytes of the tier's budget that are spoken for: weights, KV, ring and workspace."""
        other = {
            Tier.DEVICE: self.ring_bytes
            + self.device_kv_bytes
            + self.rotation_bytes
            + self.workspace_bytes,
            Tier.HOST: self.host_kv_bytes + self.staging_bytes + self.host_activation_bytes,
            Tier.NVME: self.nvme_kv_bytes + self.nvme_activation_bytes,
        }
        return self.weight_bytes(tier) + other[tier]

    def tier_of(self, unit: str) -> Tier:
        return next(p.tier for p in self.placements if p.unit == unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A run of layers [first_layer, end_layer) and the shards that hold it, by tensor-parallel
    rank."""

    index: int
    first_layer: int
    end_layer: int
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the planner says a pass will cost. Times in seconds, for the planned batch.

    ``decode_pass_s`` is the time after which every decoding sequence has one token more, and so the
    time per output token; ``stage_times_s`` are the stages' parts of it, for one pass.
    ``terms_s`` maps each bound ("device memory", "host link", "disk", "compute", "collectives") to
    its time in a decode pass of the slowest stage; ``binds`` names the largest.
    """

    decode_pass_s: float
    prefill_pass_s: float
    tokens_per_s: float
    time_to_first_token_s: float
    time_per_output_token_s: float
    binds: str
    terms_s: dict[str, float] = field(default_factory=dict)
    stage_times_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """How one replica runs. All shards hold the same number of KV blocks on each tier.

    Running sequences hold ``num_device_blocks`` and the rotating blocks, which lie on host and NVMe
    and come to the device while they are attended to, through buffers of ``num_rotation_slots``
    pieces of a layer; ``num_tail_blocks`` hold, on the host, blocks that belong on NVMe and are not
    full yet; ``num_host_blocks`` hold what was demoted. ``kv_storage_dtype`` is how KV lies on host
    and NVMe. A layer computes up to ``max_slice_tokens`` at a time: a pass of more goes through it
    slice by slice, its hidden states kept on host and NVMe meanwhile. ``attends_on_host``: what
    lies on the host stays there, and the host's cores attend to it.
    ``expert_parallel``: the ranks of a stage deal out whole experts, instead of cutting each.
    """

    model: str
    architecture: str
    dtype: str
    tensor_parallel: int
    pipeline_parallel: int
    passes_in_flight: int
    stages: tuple[StagePlan, ...]
    block_size: int
    num_device_blocks: int
    num_host_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_slice_tokens: int
    forecast: Forecast
    reason: str = ""
    expert_parallel: bool = False
    num_rotating_host_blocks: int = 0
    num_rotating_nvme_blocks: int = 0
    num_rotation_slots: int = 0
    num_tail_blocks: int = 0
    kv_storage_dtype: str = "auto"
    attends_on_host: bool = False
    version: int = PLAN_VERSION

    @property
    def num_active_blocks(self) -> int:
        """KV blocks for running sequences, wherever they lie."""
        return (
            self.num_device_blocks + self.num_rotating_host_blocks + self.num_rotating_nvme_blocks
        )

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """All shards, by rank: stage-major, tensor-parallel rank within the stage."""
        return tuple(shard for stage in self.stages for shard in stage.shards)

    def validate(self) -> None:
        """Raise PlanError naming the first thing that does not hold: counts, ranks, stages,
        budgets."""
        if self.version != PLAN_VERSION:
            raise PlanError(
                f"the plan has version {self.version}, this program reads {PLAN_VERSION}; "
                "plan again"
            )
        self._validate_counts()
        _require(len(self.stages) == self.pipeline_parallel, "pipeline_parallel", len(self.stages))
        end = 0
        for index, stage in enumerate(self.stages):
            _require(stage.index == index, f"stages[{index}].index", index)
            _require(stage.first_layer == end, f"stages[{index}].first_layer", end)
            if stage.end_layer <= stage.first_layer:
                raise PlanError(f"stages[{index}] holds no layers")
            end = stage.end_layer
            _require(
                len(stage.shards) == self.tensor_parallel, "tensor_parallel", len(stage.shards)
            )
            for tp_rank, shard in enumerate(stage.shards):
                where = f"stages[{index}].shards[{tp_rank}]"
                _require(shard.stage == index, f"{where}.stage", index)
                _require(shard.tp_rank == tp_rank, f"{where}.tp_rank", tp_rank)
        for rank, shard in enumerate(self.shards):
            _require(shard.rank == rank, f"the shard at place {rank}: rank", rank)
            _validate_shard(shard)

    def _validate_counts(self) -> None:
        for name in (
            "tensor_parallel",
            "pipeline_parallel",
            "passes_in_flight",
            "block_size",
            "num_device_blocks",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_slice_tokens",
        ):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.is_sliced and not all(shard.host_activation_bytes for shard in self.shards):
            raise PlanError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, more than the "
                f"{self.max_slice_tokens} of max_slice_tokens, but a shard has no "
                "host_activation_bytes for the others"
            )
        if self.expert_parallel and self.tensor_parallel == 1:
            raise PlanError(
                "expert_parallel is true, but tensor_parallel is 1: one rank has nobody to deal "
                "experts out to"
            )
        if self.kv_storage_dtype not in STORAGE_DTYPES:
            raise PlanError(
                f"kv_storage_dtype is {self.kv_storage_dtype!r}; there are "
                f"{', '.join(STORAGE_DTYPES)}"
            )
        if self.attends_on_host and self.kv_storage_dtype != "auto":
            raise PlanError(
                f"attends_on_host needs KV as the model computes it, but kv_storage_dtype is "
                f"{self.kv_storage_dtype}; leave one of them out"
            )
        if self.passes_in_flight > self.pipeline_parallel:
            raise PlanError(
                f"passes_in_flight is {self.passes_in_flight}, but the {self.pipeline_parallel} "
                "stages of pipeline_parallel serve one pass each; lower passes_in_flight"
            )
        for name in (
            "num_host_blocks",
            "num_rotating_host_blocks",
            "num_rotating_nvme_blocks",
            "num_tail_blocks",
        ):
            if getattr(self, name) < 0:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.max_model_len > self.num_active_blocks * self.block_size:
            raise PlanError(
                f"max_model_len is {self.max_model_len}, but the {self.num_active_blocks} blocks "
                f"for running sequences hold {self.num_active_blocks * self.block_size} tokens"
            )
        if self.num_active_blocks > self.num_device_blocks:
            longest = -(-self.max_model_len // self.block_size)
            if self.num_rotation_slots < longest:
                raise PlanError(
                    f"num_rotation_slots is {self.num_rotation_slots}, but a sequence of "
                    f"max_model_len has {longest} blocks, which rotate together"
                )

    @property
    def is_sliced(self) -> bool:
        """Whether a pass may be larger than what a layer computes at a time."""
        return self.max_num_batched_tokens > self.max_slice_tokens

    @property
    def may_lose_blocks(self) -> bool:
        """Whether KV, or what it is computed from, lies where it can be lost."""
        on_nvme = any(shard.nvme_activation_bytes for shard in self.shards)
        return on_nvme or self.num_rotating_nvme_blocks > 0

    def to_json(self) -> str:
        """The plan as JSON, readable by `from_json` of the same version."""
        return json.dumps(encode(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PartitionPlan:
        """Read and validate a plan. Raises PlanError naming the key that is unknown, missing or
        wrong."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON: {error}") from None
        if isinstance(data, dict) and data.get("version") != PLAN_VERSION:
            raise PlanError(
                f"the plan has version {data.get('version')}, this program reads {PLAN_VERSION}; "
                "plan again"
            )
        plan = decode(cls, data)
        plan.validate()
        return plan


def _require(holds: bool, name: str, value: int) -> None:
    if not holds:
        raise PlanError(f"{name} contradicts the rest of the plan, which has {value}")


def _validate_shard(shard: ShardPlan) -> None:
    where = f"shard {shard.rank}"
    parts = {
        "ring_bytes": shard.ring_bytes,
        "device_kv_bytes": shard.device_kv_bytes,
        "host_kv_bytes": shard.host_kv_bytes,
        "workspace_bytes": shard.workspace_bytes,
        "staging_bytes": shard.staging_bytes,
        "host_activation_bytes": shard.host_activation_bytes,
        "nvme_activation_bytes": shard.nvme_activation_bytes,
        **{placement.unit: placement.num_bytes for placement in shard.placements},
    }
    for name, num_bytes in parts.items():
        if num_bytes < 0:
            raise PlanError(f"{where}: {name} is {num_bytes}; it must be 0 or more")
    names = [placement.unit for placement in shard.placements]
    if len(set(names)) < len(names):
        raise PlanError(f"{where}: a unit is placed twice")
    for tier in Tier:
        if shard.used_bytes(tier) > shard.budget.of(tier):
            raise PlanError(
                f"{where} uses {shard.used_bytes(tier)} bytes of {tier.value}, more than its "
                f"budget of {shard.budget.of(tier)}"
            )
