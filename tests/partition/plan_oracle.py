"""The best score of all plans there are, by trying them: every sizing, every devices in every
order, every split, every assignment of units to tiers, one pass or one a stage. Prices come from
the cost model alone."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import combinations, permutations, product

import numpy as np

from kvcache.micro_batch import NUM_BUFFERS
from kvcache.tier import Tier
from partition import ClusterSpec, Constraints, DeviceSpec, ModelProfile, NodeSpec, Workload
from partition.cost import PAGE_BYTES, CostModel, PassShape, page_rounded, pass_time
from partition.links import Link
from partition.profile import UnitKind
from partition.sizing import Sizing
from partition.stage_table import StageTable, may_stream
from partition.tier_choice import RING_DEPTHS

Place = tuple[int, int]
"""A device: its node and its place there."""


class Oracle:
    """Tries all plans of one tensor-parallel degree (within a node, one kind) of one problem."""

    def __init__(
        self,
        profile: ModelProfile,
        cluster: ClusterSpec,
        workload: Workload,
        constraints: Constraints,
        tensor_parallel: int,
    ) -> None:
        self.profile = profile
        self.cluster = cluster
        self.workload = workload
        self.constraints = constraints
        self.table = StageTable(profile, tensor_parallel)
        self.costs = CostModel(profile=profile, tensor_parallel=tensor_parallel, activation_bytes=2)
        self.shard_choices = cache(self._shard_choices)

    def best_rate(self, sizings: list[Sizing], num_stages: int) -> float:
        """The most tokens/s with so many stages; 0: nothing fits."""
        world = self.table.tensor_parallel
        groups = [
            tuple((node, place) for place in places)
            for node, spec in enumerate(self.cluster.nodes)
            for places in combinations(range(len(spec.devices)), world)
            if len({spec.devices[place] for place in places}) == 1
        ]
        best = 0.0
        for order in permutations(groups, num_stages):
            places = [place for group in order for place in group]
            if len(set(places)) < len(places):
                continue
            for in_turn, sizing in product((False, True)[: min(2, num_stages)], sizings):
                batch = min(self.workload.concurrency, sizing.num_decoding)
                if not in_turn or batch >= num_stages:
                    cycle = self._cycle(order, sizing, batch, in_turn)
                    best = max(best, batch / cycle)
        return best

    def _cycle(
        self, order: tuple[tuple[Place, ...], ...], sizing: Sizing, batch: int, in_turn: bool
    ) -> float:
        passes = len(order) if in_turn else 1
        tokens = -(-batch // passes)
        context = self.workload.prompt_tokens + self.workload.output_tokens / 2
        context = min(context, sizing.max_model_len)
        blocks = -int(-context // self.constraints.block_size)
        used = batch * blocks
        beyond = max(0, used - sizing.num_device_blocks)
        on_host = min(beyond, sizing.num_rotating_host_blocks)
        stays = on_host if sizing.attends_on_host else 0
        shape = PassShape(
            num_tokens=tokens,
            num_sequences=tokens,
            context=context,
            host_kv=(on_host - stays) / used,
            attended_kv=stays / used,
            nvme_kv=(beyond - on_host) / used,
            written=1.0
            if sizing.num_tail_blocks >= batch
            else self.constraints.block_size
            - sizing.num_tail_blocks / batch * (self.constraints.block_size - 1),
            rewritten=self.constraints.block_size,
            host_share=sizing.stored.host_share,
            nvme_share=sizing.stored.nvme_share,
            storage_dtype=sizing.kv_storage_dtype,
            kv_read_bytes=min(4 << 20, blocks * sizing.stored.nvme_piece_bytes) or math.inf,
            kv_write_bytes=sizing.stored.nvme_piece_bytes or math.inf,
            micro_batches=math.ceil(
                Fraction(math.ceil(used / passes) * (beyond - stays), used)
                / max(1, sizing.num_rotation_slots)
            ),
        )
        tables = []
        for stage, group in enumerate(order):
            node = self.cluster.nodes[group[0][0]]
            busy = order if in_turn else (group,)
            users = sum(place[0] == group[0][0] for used in busy for place in used)
            following = order[stage + 1][0][0] if stage + 1 < len(order) else None
            next_link = None
            if following is not None:
                next_link = self.cluster.link(node, self.cluster.nodes[following])
            device = node.devices[group[0][1]]
            tables.append(self.shard_choices(device, node, users, next_link, sizing, shape))
        layers = self.profile.num_layers
        best = np.inf
        for inner in combinations(range(1, layers), len(order) - 1):
            cut = zip((0, *inner), (*inner, layers), strict=True)
            times = [table[run] for table, run in zip(tables, cut, strict=True)]
            best = min(best, passes * max(times) if in_turn else sum(times))
        return float(best)

    def _shard_choices(
        self,
        device: DeviceSpec,
        node: NodeSpec,
        users: int,
        next_link: Link | None,
        sizing: Sizing,
        shape: PassShape,
    ) -> dict[tuple[int, int], float]:
        """Seconds by run of layers."""
        layers = self.profile.num_layers
        rates = device.bandwidths.shared_by(users, node.shared)
        times: dict[tuple[int, int], float] = {}
        for run in combinations(range(layers + 1), 2):
            slowest = 0.0
            for rank in range(self.table.tensor_parallel):
                streams = self._assignments(rank, run, device, sizing)
                seconds = np.inf
                if len(streams[0]):
                    terms = self.costs.terms(
                        self.table.loads[rank].at(*run),
                        shape,
                        rates,
                        *streams,
                        group_link=node.link,
                        next_link=next_link,
                    )
                    seconds = float(np.min(pass_time(terms)))
                slowest = max(slowest, seconds)
            times[run] = slowest
        return times

    def _assignments(
        self, rank: int, run: tuple[int, int], device: DeviceSpec, sizing: Sizing
    ) -> tuple[np.ndarray, ...]:
        """Streamed bytes, those on disk, and the routed experts' part of both, of every assignment
        of the run's units that keeps the budgets, with the deepest ring beside which any does."""
        units = self.profile.stage_units(*run)
        world = self.table.tensor_parallel
        kv = self.profile.kv_layout(*run, self.constraints.block_size, rank, world).block_bytes
        streaming = [self.table.stream_size(u, rank) for u in units if may_stream(u)]
        sizes, routed = np.array(streaming).T
        rows = [u for u in units if u.kind is UnitKind.EMBEDDING]
        embedding = sum(self.table.footprint(u, rank) for u in rows)
        small = sum(self.table.footprint(u, rank) for u in units if u.kind is UnitKind.SMALL)
        device_kv = page_rounded(sizing.num_device_blocks * kv)
        room = device.budget.device_bytes - sizing.workspace_bytes - small
        room -= NUM_BUFFERS * sizing.num_rotation_slots * sizing.stored.device_piece_bytes
        lossy = sizing.kv_storage_dtype != "auto"
        num_layers = run[1] - run[0]
        stored = math.ceil(kv * sizing.stored.host_share + 8 * num_layers) if lossy else kv
        host = device.budget.host_bytes - page_rounded(sizing.num_host_blocks * stored)
        host -= page_rounded(sizing.num_rotating_host_blocks * stored)
        host -= page_rounded(sizing.num_tail_blocks * kv)
        host -= sizing.activations.host_bytes
        if device.staged or lossy:
            host -= NUM_BUFFERS * sizing.num_rotation_slots * sizing.stored.nvme_piece_bytes
        nvme = device.budget.nvme_bytes - sizing.activations.nvme_bytes
        nvme -= sizing.num_rotating_nvme_blocks * sizing.stored.nvme_piece_bytes * num_layers
        tiers = _assignments_of(len(sizes))
        held = {tier: (tiers == index) @ sizes for index, tier in enumerate(Tier)}
        streamed = (tiers != 0) * sizes
        shared = sizing.kv_share is None or device_kv <= sizing.kv_share * (
            room - self.table.longest_ring_bytes(rank)
        )
        may = np.asarray(shared | (streamed.sum(axis=1) == 0))
        staging = np.zeros(len(tiers))
        if device.staged:
            staging = 2 * ((tiers == 2) * sizes).max(axis=1)
        slots = np.sort(streamed + PAGE_BYTES * (streamed > 0), axis=1)[:, ::-1]
        for depth in RING_DEPTHS:
            left = (
                room - device_kv - held[Tier.DEVICE] - slots[:, :depth].sum(axis=1),
                host - held[Tier.HOST] - staging,
                nvme - held[Tier.NVME],
            )
            fits = may & np.all([each >= 0 for each in left], axis=0)
            fits &= np.any([each >= embedding for each in left], axis=0)
            if fits.any():
                places = tiers[fits]
                return (
                    streamed.sum(axis=1)[fits],
                    held[Tier.NVME][fits],
                    (places != 0) @ routed,
                    (places == 2) @ routed,
                )
        return (np.zeros(0),)


@cache
def _assignments_of(num_units: int) -> np.ndarray:
    """Every way to put units on three tiers, a row each."""
    return np.array(list(product(range(3), repeat=num_units)))
