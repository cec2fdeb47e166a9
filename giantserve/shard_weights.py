"""Which bytes of a checkpoint one shard holds: how its units lie, and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from giantserve.checkpoint import Checkpoint, SourceMap
from giantserve.errors import ConfigError
from giantserve.stored_files import file_prefix
from kvcache.arena import Arena
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier
from kvcache.unit_layout import UnitLayout
from partition.meta_model import ATTENTION_NAME, build_meta_model
from partition.plan import PartitionPlan
from partition.profile import AttentionKind, ModelProfile, Unit
from partition.profile_cache import known_or_made
from partition.profiling import load_config


class ShardWeights:
    """The units of one rank, in the order of a pass. ``profile`` is the variant that the plan
    runs. Reads the checkpoint's headers; raises what `Checkpoint` raises."""

    def __init__(
        self,
        plan: PartitionPlan,
        rank: int,
        config: Any,
        profile: ModelProfile,
        world: int,
        nvme_dir: Path | None,
        storage_backend: str = "posix",
    ) -> None:
        self._plan = plan
        self._shard = plan.shards[rank]
        self._stage = plan.stages[self._shard.stage]
        self._profile = profile
        self._world = world
        self._nvme_dir = nvme_dir
        self._storage_backend = storage_backend
        self._checkpoint = Checkpoint(Path(plan.model))
        generic = profile.attention is AttentionKind.GENERIC
        meta = build_meta_model(config, "eager" if generic else ATTENTION_NAME)
        self._source = SourceMap(meta, self._checkpoint)
        self._tensors = {**dict(meta.named_parameters()), **dict(meta.named_buffers())}
        units = profile.stage_units(self._stage.first_layer, self._stage.end_layer)
        self._parameters = {p.name: p for unit in units for p in unit.parameters}
        self.layouts = [self._layout(unit) for unit in units]
        self.placements = {p.unit: p.tier for p in self._shard.placements}

    def fill(self, unit: UnitLayout, buffer: torch.Tensor) -> None:
        """Write this rank's part of the unit's tensors into its bytes (uint8, CPU)."""
        for slot in unit.tensors:
            self._source.fill(slot.name, *self._part(slot.name), slot.view(buffer))

    @property
    def key(self) -> str:
        """Names exactly which part of which weights the rank holds, and how it lies in its
        units."""
        kind = "ep" if self._plan.expert_parallel else "tp"
        return file_prefix(Path(self._plan.model)) + "-".join(
            (
                self._checkpoint.fingerprint[:16],
                self._plan.dtype,
                f"{kind}{self._shard.tp_rank}of{self._world}",
                f"layers{self._stage.first_layer}to{self._stage.end_layer}",
                self._arrangement(),
            )
        )

    def _arrangement(self) -> str:
        """A hash of what each tensor's bytes in its unit are: where they lie, which part of it they
        are, and the version of what converts the checkpoint's tensors to the model's."""
        known = hashlib.sha256(version("transformers").encode())
        for unit in self.layouts:
            for slot in unit.tensors:
                known.update(repr((unit.name, slot, self._part(slot.name))).encode())
        return known.hexdigest()[:16]

    def _part(self, name: str) -> tuple[int | None, tuple[tuple[int, int], ...]]:
        """The dimension and its ranges that the rank holds of a parameter; None: all of it."""
        parameter = self._parameters[name]
        if parameter.rule is None or self._world == 1:
            return None, ()
        ranges = parameter.ranges(self._profile.heads, self._shard.tp_rank, self._world)
        return parameter.rule.dim, ranges

    def open_store(self) -> ShardStore | None:
        """The store of what the plan keeps on NVMe, whether it is written or not; None: nothing.

        Raises ConfigError without a folder, and what `ShardStore` raises.
        """
        if Tier.NVME not in self.placements.values():
            return None
        if self._nvme_dir is None:
            raise ConfigError("the plan keeps weights on NVMe, but no nvme_dir was given")
        return ShardStore(self._nvme_dir / "weights", self.key, backend=self._storage_backend)

    def pack(self, progress: Callable[[int], None]) -> Path | None:
        """Write the store, unless it is there, and return its file (None: the plan keeps nothing
        on NVMe); ``progress`` gets each unit's bytes."""
        store = self.open_store()
        if store is None:
            return None
        units = [unit for unit in self.layouts if self.placements[unit.name] is Tier.NVME]
        arena = Arena(Tier.HOST, max(unit.num_bytes for unit in units))
        try:
            store.open_units(units, self.fill, arena.allocate, progress)
        finally:
            store.close()
            arena.close()
        return store.path

    def _layout(self, unit: Unit) -> UnitLayout:
        heads, rank = self._profile.heads, self._shard.tp_rank
        return UnitLayout.pack(
            unit.name,
            [
                (p.name, p.local_shape(heads, rank, self._world), self._tensors[p.name].dtype)
                for p in unit.parameters
            ],
            by_expert={p.name for p in unit.parameters if self._profile.is_routed(p)},
        )


def plan_profile(plan: PartitionPlan, trust_remote_code: bool) -> tuple[Any, ModelProfile]:
    """The model's config and the variant of its profile that the plan runs.

    Raises ConfigError where the plan's experts cannot be dealt out.
    """
    config = load_config(plan.model, plan.dtype, trust_remote_code)
    profile = known_or_made(
        plan.model, plan.dtype, trust_remote_code, lambda: ModelProfile.from_config(config)
    )
    if not plan.expert_parallel:
        return config, profile
    if refusal := profile.why_not_expert_parallel(plan.tensor_parallel):
        raise ConfigError(f"the plan is expert parallel, but {refusal}; plan again")
    return config, profile.expert_parallel_variant
