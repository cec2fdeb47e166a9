"""What a decode pass asks of each stage, unit by unit, in the cost model's own terms."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from kvcache.layout import DTYPE_BYTES
from kvcache.tier import Tier
from partition.cluster import ClusterSpec, StageDevices
from partition.cost import Array, CostModel, Load, PassShape, compute_time, pass_time, unit_row
from partition.device_pool import DevicePool
from partition.plan import PartitionPlan, ShardPlan, StagePlan
from partition.problem import PlanningProblem
from partition.profile import ModelProfile, Unit, UnitKind
from partition.sizing import rotation_load, stored_pieces
from partition.stage_table import StageTable, may_stream
from partition.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitWork:
    """One unit of one pass: seconds on each lane, and the bytes that it takes of the ring (0: it is
    resident)."""

    unit: str
    tier: Tier
    disk_s: float
    host_link_s: float
    compute_s: float
    collectives_s: float
    ring_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """The slowest rank of a stage. ``overhead_s`` is lost once a pass, ``send_s`` takes the hidden
    states to the next stage."""

    stage: int
    rank: int
    ring_bytes: int
    overhead_s: float
    send_s: float
    units: tuple[UnitWork, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWork:
    """A decode pass over all stages. ``moved_bytes`` are those of all shards together, by link."""

    num_sequences: int
    passes_in_flight: int
    stages: tuple[StageWork, ...]
    moved_bytes: dict[str, int]


class _Streams(NamedTuple):
    """Bytes that do not stay on the device, and the routed experts' part of them."""

    streamed_bytes: int
    disk_bytes: int
    streamed_experts: int
    disk_experts: int


def pass_work(plan: PartitionPlan, problem: PlanningProblem) -> PassWork:
    """The decode pass that ``plan``, made for ``problem``, was forecast for."""
    return _Pricing(plan, problem).work()


class _Pricing:
    def __init__(self, plan: PartitionPlan, problem: PlanningProblem) -> None:
        self._plan = plan
        self._table = StageTable(problem.profile, plan.tensor_parallel, plan.expert_parallel)
        self._profile = self._table.profile
        self._costs = CostModel(
            profile=self._profile,
            tensor_parallel=plan.tensor_parallel,
            activation_bytes=DTYPE_BYTES[plan.dtype],
        )
        self._shape = _decode_shape(plan, self._profile, problem.workload)
        self._stage_devices = _stage_devices(plan, problem.cluster)

    def work(self) -> PassWork:
        moved: Counter[str] = Counter()
        stages = []
        for stage, held in zip(self._plan.stages, self._stage_devices, strict=True):
            terms = [self._shard_terms(stage, shard, held) for shard in stage.shards]
            for shard, own in zip(stage.shards, terms, strict=True):
                moved.update(self._moved(stage, shard, own, held))
            times = [float(pass_time(own)) for own in terms]
            slowest = times.index(max(times))
            stages.append(self._stage(stage, stage.shards[slowest], held))
        return PassWork(
            num_sequences=self._shape.num_sequences,
            passes_in_flight=self._plan.passes_in_flight,
            stages=tuple(stages),
            moved_bytes={link: round(num_bytes) for link, num_bytes in moved.items()},
        )

    def _stage(self, stage: StagePlan, shard: ShardPlan, held: StageDevices) -> StageWork:
        units = self._profile.stage_units(stage.first_layer, stage.end_layer)
        idle = self._terms(_load({}), shard, held)
        ending = self._terms(_load({}), shard, held, send=True)
        rows = self._rows(units, shard.tp_rank)
        priced: dict[tuple[object, ...], UnitWork] = {}
        works = []
        for unit, row in zip(units, rows, strict=True):
            tier = shard.tier_of(unit.name)
            key = (tier, *row.items())
            if key not in priced:
                streams = self._streamed(unit, shard)
                terms = self._terms(_load(row), shard, held, streams)
                busy = float(compute_time(terms)) - float(compute_time(idle))
                collectives = float(terms["collectives"])
                priced[key] = UnitWork(
                    unit=unit.name,
                    tier=tier,
                    disk_s=float(terms["disk"]),
                    host_link_s=float(terms["host link"]),
                    compute_s=busy - collectives,
                    collectives_s=collectives,
                    ring_bytes=streams.streamed_bytes,
                )
            works.append(replace(priced[key], unit=unit.name))
        return StageWork(
            stage=stage.index,
            rank=shard.rank,
            ring_bytes=shard.ring_bytes,
            overhead_s=float(compute_time(idle)),
            send_s=float(ending["collectives"]),
            units=tuple(works),
        )

    def _rows(self, units: tuple[Unit, ...], rank: int) -> list[dict[str, float]]:
        """Each unit's part of its stage's `Load`. A layer's KV goes to its attention; what comes
        once a layer is dealt out over its large units."""
        table, load = self._table, self._table.loads[rank]
        large: dict[int, list[str]] = defaultdict(list)
        caches: dict[int, str] = {}
        for unit in units:
            if unit.layer is not None and (may_stream(unit) or unit.layer not in large):
                large[unit.layer].append(unit.name)
                if unit.kind is UnitKind.ATTENTION:
                    caches.setdefault(unit.layer, unit.name)
        rows = []
        for unit in units:
            num_bytes, footprint = table.unit_bytes(unit, rank), table.footprint(unit, rank)
            row = unit_row(unit, self._profile, rank, table.tensor_parallel, num_bytes, footprint)
            if unit.layer is not None:
                layer = load.at(unit.layer, unit.layer + 1)
                names = large[unit.layer]
                if unit.name in names:
                    row["num_layers"] = 1 / len(names)
                if unit.name == caches.get(unit.layer, names[0]):
                    row["kv_bytes_per_token"] = float(layer.kv_bytes_per_token)
                    row["attention_flops"] = float(layer.attention_flops)
            rows.append(row)
        return rows

    def _streamed(self, unit: Unit, shard: ShardPlan) -> _Streams:
        """What the shard's slice has that does not stay."""
        tier = shard.tier_of(unit.name)
        if tier is Tier.DEVICE or not may_stream(unit):
            return _Streams(0, 0, 0, 0)
        num_bytes, routed = self._table.stream_size(unit, shard.tp_rank)
        on_disk = tier is Tier.NVME
        return _Streams(num_bytes, num_bytes * on_disk, routed, routed * on_disk)

    def _shard_streamed(self, stage: StagePlan, shard: ShardPlan) -> _Streams:
        units = self._profile.stage_units(stage.first_layer, stage.end_layer)
        parts = [self._streamed(unit, shard) for unit in units]
        return _Streams(*(sum(each) for each in zip(*parts, strict=True)))

    def _shard_terms(
        self, stage: StagePlan, shard: ShardPlan, held: StageDevices
    ) -> dict[str, Array]:
        load = self._table.loads[shard.tp_rank].at(stage.first_layer, stage.end_layer)
        return self._terms(load, shard, held, self._shard_streamed(stage, shard), send=True)

    def _terms(
        self,
        load: Load,
        shard: ShardPlan,
        held: StageDevices,
        streams: _Streams | None = None,
        *,
        send: bool = False,
    ) -> dict[str, Array]:
        return self._costs.terms(
            load,
            self._shape,
            held.devices[shard.tp_rank].bandwidths,
            *(streams or ()),
            group_link=held.group_link,
            next_link=held.next_link if send else None,
        )

    def _moved(
        self, stage: StagePlan, shard: ShardPlan, terms: dict[str, Array], held: StageDevices
    ) -> dict[str, float]:
        """Bytes of one shard by link: weights and KV from its device's memory, what streams, and
        hidden states (all-reduced twice a layer, and sent to the next stage)."""
        shape, world = self._shape, self._table.tensor_parallel
        load = self._table.loads[shard.tp_rank].at(stage.first_layer, stage.end_layer)
        streams = self._shard_streamed(stage, shard)
        left_out = 1 - self._profile.streamed_expert_share(shape.num_tokens)
        weights = (
            float(terms["device memory"]) * held.devices[shard.tp_rank].bandwidths.device_memory
        )
        cached = float(load.kv_bytes_per_token) * shape.num_sequences * shape.context
        hidden = shape.num_tokens * self._profile.hidden_size * DTYPE_BYTES[self._plan.dtype]
        layers = stage.end_layer - stage.first_layer
        reduced = 2 * layers * hidden * 2 * (world - 1) / world
        sent = hidden if held.next_link is not None else 0
        return {
            "device memory": weights + cached,
            "host link": streams.streamed_bytes
            - left_out * streams.streamed_experts
            + cached * (shape.host_share * shape.host_kv + shape.nvme_share * shape.nvme_kv),
            "disk": streams.disk_bytes
            - left_out * streams.disk_experts
            + cached * shape.nvme_share * shape.nvme_kv,
            "between devices": reduced + sent,
        }


def _decode_shape(plan: PartitionPlan, profile: ModelProfile, workload: Workload) -> PassShape:
    stored = stored_pieces(profile, plan.block_size, plan.kv_storage_dtype)
    length = min(workload.context, plan.max_model_len)
    fitting = max(1, plan.num_active_blocks * plan.block_size // length)
    batch = min(workload.concurrency, plan.max_num_seqs, fitting)
    sequences = math.ceil(batch / plan.passes_in_flight)
    context = min(workload.prompt_tokens + workload.output_tokens / 2, plan.max_model_len)
    return PassShape(
        num_tokens=sequences,
        num_sequences=sequences,
        context=context,
        **rotation_load(plan, batch, context, plan.passes_in_flight, stored),
    )


def _stage_devices(plan: PartitionPlan, cluster: ClusterSpec) -> tuple[StageDevices, ...]:
    """The devices that the plan names, with their part of what the plan makes them share."""
    pool = DevicePool(cluster)
    classes = {
        (cluster.nodes[each.node].name, cluster.nodes[each.node].device_names[member]): index
        for index, each in enumerate(pool.classes)
        for member in each.members
    }
    sequence = tuple(
        tuple(classes[shard.node, shard.device] for shard in stage.shards) for stage in plan.stages
    )
    in_turn = plan.passes_in_flight > 1
    return tuple(pool.stages[number] for number in pool.number(sequence, in_turn))


def _load(row: dict[str, float]) -> Load:
    return Load(**{each.name: np.asarray(row.get(each.name, 0.0)) for each in fields(Load)})
