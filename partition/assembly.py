"""From a solution to a PartitionPlan: every unit named, every byte assigned, and the forecast
written down."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from kvcache.layout import KVLayout
from kvcache.tier import Tier
from partition.byte_size import format_bytes
from partition.cost import (
    PAGE_BYTES,
    Array,
    CostModel,
    PassShape,
    pass_time,
)
from partition.device_pool import DevicePool
from partition.layer_split import cut_time
from partition.layout_search import Layout, Solution
from partition.pass_tokens import NO_ROOM, balanced_slices
from partition.plan import Forecast, PartitionPlan, ShardPlan, StagePlan, UnitPlacement
from partition.profile import Unit, UnitKind
from partition.sizing import (
    Sizing,
    batch_size,
    decode_shape,
    num_prefill_passes,
    prefill_shape,
)
from partition.stage_table import StageTable, may_stream
from partition.tier_choice import TierChoice
from partition.workload import Constraints, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What is needed to write a solution down as a plan."""

    model: str
    table: StageTable
    costs: CostModel
    layout: Layout
    pool: DevicePool
    sizing: Sizing
    workload: Workload
    constraints: Constraints

    def plan(self, solution: Solution) -> PartitionPlan:
        """The plan of ``solution``; validated."""
        return replace(self, sizing=self._with_pass_tokens(solution))._write_down(solution)

    def _with_pass_tokens(self, solution: Solution) -> Sizing:
        """The sizing with as many tokens a pass as are free beside the weights that stream."""
        sizing, room = self.sizing, self.sizing.activations
        slice_tokens = sizing.max_slice_tokens
        if room is NO_ROOM or sizing.max_num_batched_tokens > slice_tokens:
            return sizing
        shape = replace(prefill_shape(sizing, self.workload), num_tokens=slice_tokens)
        slices = 0.0
        for stage, choices in enumerate(solution.choices):
            held = self.pool.stages[solution.numbers[stage]]
            first, end = solution.split[stage]
            terms = self._terms(solution, stage, shape)
            for rank, choice in enumerate(choices):
                if not choice.streamed_bytes:
                    continue
                if choice.ring_bytes < self.table.slicing_ring_bytes(rank):
                    return replace(sizing, activations=NO_ROOM)
                rates = held.devices[rank].bandwidths
                found = balanced_slices(terms[rank], rates, room, end - first)
                slices = max(slices, found)
        if slices < 2:
            return replace(sizing, activations=NO_ROOM)
        tokens = min(room.max_tokens, int(slices) * slice_tokens)
        return replace(sizing, max_num_batched_tokens=tokens, activations=room.for_tokens(tokens))

    def _write_down(self, solution: Solution) -> PartitionPlan:
        profile, sizing = self.table.profile, self.sizing
        block_size = self.constraints.block_size
        blocks = sizing.num_device_blocks + self._spare_blocks(solution)
        places = self.pool.places(solution.sequence)
        stages = tuple(
            StagePlan(
                index=stage,
                first_layer=first,
                end_layer=end,
                shards=tuple(
                    self._shard(solution, stage, rank, choice, places[stage][rank], blocks)
                    for rank, choice in enumerate(solution.choices[stage])
                ),
            )
            for stage, (first, end) in enumerate(solution.split)
        )
        limit = self.constraints.max_model_len or profile.max_position_embeddings
        forecast = self.forecast(solution)
        plan = PartitionPlan(
            model=self.model,
            architecture=profile.architecture,
            dtype=profile.dtype,
            tensor_parallel=self.table.tensor_parallel,
            pipeline_parallel=len(stages),
            passes_in_flight=self.layout.passes_in_flight,
            stages=stages,
            block_size=block_size,
            num_device_blocks=blocks,
            num_host_blocks=sizing.num_host_blocks,
            num_rotating_host_blocks=sizing.num_rotating_host_blocks,
            num_rotating_nvme_blocks=sizing.num_rotating_nvme_blocks,
            num_rotation_slots=sizing.num_rotation_slots,
            num_tail_blocks=sizing.num_tail_blocks,
            kv_storage_dtype=self.sizing.kv_storage_dtype,
            attends_on_host=sizing.attends_on_host,
            max_model_len=sizing.max_model_len
            if sizing.num_rotation_slots
            else min(limit, blocks * block_size),
            max_num_seqs=sizing.max_num_seqs,
            max_num_batched_tokens=sizing.max_num_batched_tokens,
            max_slice_tokens=sizing.max_slice_tokens,
            forecast=forecast,
            expert_parallel=profile.expert_parallel,
            reason=_reason(self.layout, sizing, stages, forecast, self.workload),
        )
        plan.validate()
        return plan

    def forecast(self, solution: Solution) -> Forecast:
        """Times for the workload: decode at its concurrency, one prompt's prefill by chunks."""
        stages, in_turn = range(len(solution.split)), self.layout.in_turn
        batch = batch_size(self.sizing, self.workload)
        prefill = prefill_shape(self.sizing, self.workload)
        prefill_times = [_slowest(self._terms(solution, stage, prefill)) for stage in stages]
        decode = decode_shape(self.sizing, self.workload, self.layout.passes_in_flight)
        terms = [self._terms(solution, stage, decode) for stage in stages]
        times = [_slowest(by_rank) for by_rank in terms]
        cycle = cut_time(times, in_turn)
        waits = max(terms[times.index(max(times))], key=lambda rank: float(pass_time(rank)))
        terms_s = {name: float(value) for name, value in waits.items()}
        more_chunks = num_prefill_passes(self.sizing, self.workload) - 1
        prefill_s = sum(prefill_times)
        return Forecast(
            decode_pass_s=cycle,
            prefill_pass_s=prefill_s,
            tokens_per_s=batch / cycle if cycle > 0 else 0.0,
            time_to_first_token_s=prefill_s
            + more_chunks * (max(prefill_times) if in_turn else prefill_s),
            time_per_output_token_s=cycle,
            binds=max(terms_s, key=lambda name: terms_s[name]),
            terms_s=terms_s,
            stage_times_s=tuple(times),
        )

    def _terms(self, solution: Solution, stage: int, shape: PassShape) -> list[dict[str, Array]]:
        """The terms of each of a stage's ranks."""
        held = self.pool.stages[solution.numbers[stage]]
        return [
            self.costs.terms(
                self.table.loads[rank].at(*solution.split[stage]),
                shape,
                held.devices[rank].bandwidths,
                choice.streamed_bytes,
                choice.disk_bytes,
                choice.streamed_experts,
                choice.disk_experts,
                group_link=held.group_link,
                next_link=held.next_link,
            )
            for rank, choice in enumerate(solution.choices[stage])
        ]

    def _spare_blocks(self, solution: Solution) -> int:
        """Blocks that the devices still hold when no weight streams: longer contexts, more cached
        prefixes."""
        limit = self.constraints.max_model_len or self.table.profile.max_position_embeddings
        block_size, now = self.constraints.block_size, self.sizing.num_device_blocks
        wanted = max(0, math.ceil(limit / block_size) - now)
        rotating = self.sizing.num_rotating_host_blocks + self.sizing.num_rotating_nvme_blocks
        wanted = rotating or wanted
        spare = [wanted]
        for run, choices in zip(solution.split, solution.choices, strict=True):
            for rank, choice in enumerate(choices):
                if choice.streamed_bytes:
                    return 0
                block_bytes = self._block_bytes(run, rank)
                free = max(0, choice.free_device_bytes - PAGE_BYTES)  # KV ends on a page
                spare.append(free // block_bytes if block_bytes else wanted)
        return min(spare)

    def _block_bytes(self, run: tuple[int, int], rank: int) -> int:
        return self._layout(run, rank).block_bytes

    def _layout(self, run: tuple[int, int], rank: int) -> KVLayout:
        return self.table.profile.kv_layout(
            *run,
            self.constraints.block_size,
            rank,
            self.table.tensor_parallel,
            self.sizing.kv_storage_dtype,
        )

    def _shard(
        self,
        solution: Solution,
        stage: int,
        rank: int,
        choice: TierChoice,
        place: tuple[str, str],
        blocks: int,
    ) -> ShardPlan:
        run = solution.split[stage]
        units = self.table.profile.stage_units(*run)
        tiers = self._unit_tiers(units, rank, choice)
        sizes = {unit.name: self.table.unit_bytes(unit, rank) for unit in units}
        block_bytes, sizing = self._block_bytes(run, rank), self.sizing
        device = self.pool.stages[solution.numbers[stage]].devices[rank]
        return ShardPlan(
            rank=stage * self.table.tensor_parallel + rank,
            stage=stage,
            tp_rank=rank,
            node=place[0],
            device=place[1],
            budget=device.budget,
            placements=tuple(
                UnitPlacement(unit=unit.name, tier=tiers[unit.name], num_bytes=sizes[unit.name])
                for unit in units
            ),
            ring_bytes=choice.ring_bytes,
            device_kv_bytes=blocks * block_bytes,
            host_kv_bytes=(sizing.num_host_blocks + sizing.num_rotating_host_blocks)
            * self._layout(run, rank).stored_block_bytes
            + sizing.num_tail_blocks * block_bytes,
            nvme_kv_bytes=sizing.num_rotating_nvme_blocks
            * sizing.stored.nvme_piece_bytes
            * (run[1] - run[0]),
            rotation_bytes=self.sizing.rotation_bytes,
            host_activation_bytes=sizing.activations.host_bytes,
            nvme_activation_bytes=sizing.activations.nvme_bytes,
            workspace_bytes=self.sizing.workspace_bytes,
            staging_bytes=choice.staging_bytes
            + (sizing.landing_bytes if sizing.needs_landing(device.staged) else 0),
        )

    def _unit_tiers(
        self, units: tuple[Unit, ...], rank: int, choice: TierChoice
    ) -> dict[str, Tier]:
        """Name the units: within a class the resident ones are spread evenly over the pass, so that
        the streams run evenly, and so are the host's among the rest."""
        tiers: dict[str, Tier] = {}
        members: dict[tuple[int, int], list[str]] = defaultdict(list)
        for unit in units:
            if unit.kind is UnitKind.EMBEDDING:
                tiers[unit.name] = choice.embedding or Tier.DEVICE
            elif may_stream(unit):
                members[self.table.stream_size(unit, rank)].append(unit.name)
            else:
                tiers[unit.name] = Tier.DEVICE
        classes = self.table.stream_classes(units, rank)
        for index, each in enumerate(classes):
            names = members[each.size, each.routed]
            resident = _spread(names, choice.resident[index])
            rest = [name for name in names if name not in resident]
            on_host = _spread(rest, choice.on_host[index])
            for name in names:
                tiers[name] = (
                    Tier.DEVICE if name in resident else Tier.HOST if name in on_host else Tier.NVME
                )
        return tiers


def _slowest(by_rank: list[dict[str, Array]]) -> float:
    return max(float(pass_time(terms)) for terms in by_rank)


def _spread(names: list[str], count: int) -> set[str]:
    total = len(names)
    return {name for i, name in enumerate(names) if (i + 1) * count // total > i * count // total}


def _reason(
    layout: Layout,
    sizing: Sizing,
    stages: tuple[StagePlan, ...],
    forecast: Forecast,
    workload: Workload,
) -> str:
    shards = [shard for stage in stages for shard in stage.shards]
    held = {tier: sum(shard.weight_bytes(tier) for shard in shards) for tier in Tier}
    where = ", ".join(
        f"{format_bytes(num_bytes)} {'on ' + tier.value}"
        for tier, num_bytes in held.items()
        if num_bytes
    )
    return (
        f"TP {layout.tensor_parallel} x PP {layout.pipeline_parallel}"
        f"{', a pass for each stage' if layout.in_turn else ''}, weights {where}{_beyond(sizing)}: "
        f"{forecast.binds} binds, "
        f"{batch_size(sizing, workload)} sequences decode at {forecast.tokens_per_s:.3g} tokens/s "
        f"({forecast.decode_pass_s:.3g} s a pass)"
    )


def _beyond(sizing: Sizing) -> str:
    """What is special of KV that is not on the device."""
    if sizing.kv_storage_dtype != "auto":
        return f", KV below it {sizing.kv_storage_dtype}"
    return ", KV on host attended to there" if sizing.attends_on_host else ""
