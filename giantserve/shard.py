"""One rank of a replica: its stage, its bytes on the three tiers, and the passes it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from giantserve.errors import ConfigError
from giantserve.models.batch import ChunkSpec
from giantserve.models.collectives import StageLink, TensorParallel
from giantserve.models.stage_model import PassSlice, StageModel
from giantserve.sampler import Sampler
from giantserve.sampling_row import SamplingRow
from giantserve.shard_spec import ShardSpec
from giantserve.shard_weights import ShardWeights, plan_profile
from giantserve.step import NewSequence, SampledToken, SequenceChunk, StepPlan, StepResult
from kvcache.activations import ActivationStore
from kvcache.arena import Arena
from kvcache.block_copy import BlockCopy
from kvcache.block_pool import CachedBlock
from kvcache.kv_rotation import KVRotation
from kvcache.kv_store import KVStore
from kvcache.tier import Tier
from kvcache.trace import Trace
from kvcache.transfer_stats import Link, LinkTotals, TransferStats
from kvcache.weights import WeightManager
from partition.profile import UnitKind

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""


@dataclass(slots=True)
class _Sequence:
    """What a shard remembers of a sequence between passes."""

    new: NewSequence
    block_ids: list[int]
    output_token_ids: list[int]


class Shard:
    """Executes passes in the order given. Not thread-safe: one pass at a time."""

    def __init__(
        self,
        spec: ShardSpec,
        tensor_parallel: TensorParallel,
        link: StageLink,
        progress: Progress,
    ) -> None:
        plan = spec.plan
        self._plan = plan
        self._shard = plan.shards[spec.rank]
        self._stage = plan.stages[self._shard.stage]
        self._device = torch.device(spec.device)
        self._link = link
        self._trace = Trace() if spec.trace else None
        config, profile = plan_profile(plan, spec.trust_remote_code)
        self._dtype = getattr(torch, plan.dtype)
        self._hidden_size = profile.hidden_size
        layers = (self._stage.first_layer, self._stage.end_layer)
        self._model = StageModel(config, profile, *layers, tensor_parallel, self._device)
        budget = self._shard.budget
        self.device_arena = Arena(Tier.DEVICE, budget.device_bytes, self._device)
        self.host_arena = Arena(Tier.HOST, budget.host_bytes, torch.device("cpu"))
        adjoins = plan.attends_on_host and self._device.type == "cpu"
        self._kv = KVStore(
            profile.kv_layout(
                *layers,
                plan.block_size,
                tensor_parallel.rank,
                tensor_parallel.world,
                plan.kv_storage_dtype,
            ),
            device_arena=self.device_arena,
            host_arena=self.host_arena,
            num_device_blocks=plan.num_device_blocks,
            num_host_blocks=plan.num_host_blocks,
            num_adjoining_blocks=plan.num_rotating_host_blocks if adjoins else 0,
        )
        source = ShardWeights(
            plan,
            spec.rank,
            config,
            profile,
            tensor_parallel.world,
            spec.nvme_dir,
            spec.storage_backend,
        )
        self._rotation = self._make_rotation(spec, f"{source.key}-kv-{plan.kv_storage_dtype}")
        self._activations = self._make_activations(spec)
        self._is_exact = spec.exact_attention
        self._weights = self._load_weights(source, progress)
        self._sampler = Sampler()
        self._sequences: dict[int, _Sequence] = {}
        self._lost: set[CachedBlock] = set()
        self._busy_s = 0.0
        self._passes = 0

    def _make_rotation(self, spec: ShardSpec, key: str) -> KVRotation | None:
        plan = self._plan
        if plan.num_active_blocks == plan.num_device_blocks:
            return None
        if plan.num_rotating_nvme_blocks and spec.nvme_dir is None:
            raise ConfigError("the plan keeps KV on NVMe, but no nvme_dir was given")
        rotation = KVRotation(
            self._kv,
            num_host_blocks=plan.num_rotating_host_blocks,
            num_nvme_blocks=plan.num_rotating_nvme_blocks,
            num_tail_blocks=plan.num_tail_blocks,
            attends_on_host=plan.attends_on_host,
            num_slots=plan.num_rotation_slots,
            device_arena=self.device_arena,
            host_arena=self.host_arena,
            folder=None if spec.nvme_dir is None else spec.nvme_dir / "kv",
            kept_as=key if spec.keeps_prefixes else None,
            trace=self._trace,
        )
        self._kv.extend(rotation)
        return rotation

    def _make_activations(self, spec: ShardSpec) -> ActivationStore | None:
        plan, shard = self._plan, self._shard
        if not plan.is_sliced:
            return None
        if shard.nvme_activation_bytes and spec.nvme_dir is None:
            raise ConfigError("the plan keeps activations on NVMe, but no nvme_dir was given")
        return ActivationStore(
            host_bytes=shard.host_activation_bytes,
            nvme_bytes=shard.nvme_activation_bytes,
            slice_bytes=plan.max_slice_tokens * self._row_bytes,
            device=self._device,
            host_arena=self.host_arena,
            folder=None if spec.nvme_dir is None else spec.nvme_dir / "activations",
            trace=self._trace,
        )

    @property
    def _row_bytes(self) -> int:
        itemsize: int = self._dtype.itemsize
        return self._hidden_size * itemsize

    def _load_weights(self, source: ShardWeights, progress: Progress) -> WeightManager:
        total = sum(unit.num_bytes for unit in source.layouts)
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress("loading weights", done, total)

        weights = WeightManager(
            units=source.layouts,
            placements=source.placements,
            rows_only={u.name for u in self._model.units if u.kind is UnitKind.EMBEDDING},
            device=self._device,
            device_arena=self.device_arena,
            host_arena=self.host_arena,
            ring_bytes=self._shard.ring_bytes,
            store=source.open_store(),
            trace=self._trace,
        )
        resident = {p.unit for p in self._shard.placements if p.tier is Tier.DEVICE}
        self._model.attach(
            weights,
            self._kv,
            resident,
            self._rotation,
            self._trace,
            exact_attention=self._is_exact,
        )
        weights.load(
            source.fill,
            advance,
            first=self._model.units_bound_first,
            arrived=partial(self._model.take_resident, arena=self.device_arena),
        )
        return weights

    def wait_until_loaded(self) -> None:
        """Until all weights are on their tiers: passes run before, and wait for the units they
        need. Raises what the load failed with, StoreError once closed."""
        self._weights.wait_until_loaded()

    def used_bytes(self) -> dict[Tier, int]:
        """What it holds on each tier."""
        on_disk = (self._weights, self._rotation, self._activations)
        return {
            Tier.DEVICE: self.device_arena.used_bytes,
            Tier.HOST: self.host_arena.used_bytes,
            Tier.NVME: sum(each.nvme_bytes for each in on_disk if each is not None),
        }

    @property
    def progress(self) -> int:
        """How many layers were called and transfers ended so far: grows while it gets on."""
        moved = sum(totals.num_transfers for totals in self._link_totals().values())
        return self._model.layers_run + moved

    @torch.no_grad()
    def run(self, plan: StepPlan) -> StepResult | None:
        """Execute one pass; the last stage's first rank returns the tokens."""
        started = time.perf_counter()
        for seq_id in plan.finished:
            self._sequences.pop(seq_id, None)
        for new in plan.new:
            self._sequences[new.seq_id] = _Sequence(
                new, list(new.block_ids), list(new.output_token_ids)
            )
        self._kv.copy(plan.copies)
        tokens: list[SampledToken] = []
        prompts: dict[int, Any] = {}
        if plan.chunks:
            tokens, prompts = self._compute(plan)
            self._passes += 1
        elapsed = time.perf_counter() - started
        self._busy_s += elapsed
        if self._trace is not None:
            what = f"{plan.num_tokens} tokens of {len(plan.chunks)} sequences"
            self._trace.add("passes", what, started)
        if not (self._model.is_last and self._shard.tp_rank == 0):
            return None
        return StepResult(
            step_id=plan.step_id, tokens=tuple(tokens), prompt_logprobs=prompts, elapsed_s=elapsed
        )

    @property
    def may_lose_blocks(self) -> bool:
        """Whether the replica waits for what each shard lost."""
        return self._plan.may_lose_blocks

    def take_lost(self) -> tuple[CachedBlock, ...]:
        """The blocks lost since the last call: the passes since then computed nonsense from
        them."""
        lost, self._lost = self._lost, set()
        return (*lost, *(() if self._rotation is None else self._rotation.take_lost()))

    @property
    def kept(self) -> dict[int, bytes]:
        """The content of the blocks that an earlier shard of this kind kept, oldest use first."""
        return {} if self._rotation is None else self._rotation.kept

    def keep(self, copies: Sequence[BlockCopy], hashes: Mapping[int, bytes]) -> None:
        """Run ``copies``, and leave the content of these NVMe blocks to a later shard."""
        self._kv.copy(copies)
        if self._rotation is not None:
            lost = {block.block_id for block in self._rotation.take_lost()}
            self._rotation.keep({b: found for b, found in hashes.items() if b not in lost})

    def _compute(self, plan: StepPlan) -> tuple[list[SampledToken], dict[int, Any]]:
        """What this shard sampled."""
        slices = self._slices(plan.chunks)
        parts = [self._pass_slice(chunks) for chunks in slices]
        tokens: list[SampledToken] = []
        prompts: dict[int, Any] = {}
        for chunks, part, output in zip(slices, parts, self._outputs(parts), strict=True):
            if not self._model.is_last:
                self._link.send(output)
            elif self._shard.tp_rank == 0:
                sampled, found = self._sample(chunks, output.float(), part.spans)
                tokens += sampled
                for seq_id, logprobs in found.items():
                    prompts[seq_id] = (*prompts.get(seq_id, ()), *logprobs)
        return tokens, prompts

    def _slices(self, chunks: Sequence[SequenceChunk]) -> list[list[SequenceChunk]]:
        """The chunks of a pass, as many together as a layer computes at a time."""
        slices: list[list[SequenceChunk]] = [[]]
        room = self._plan.max_slice_tokens
        for chunk in chunks:
            if len(chunk.token_ids) > room:
                slices.append([])
                room = self._plan.max_slice_tokens
            slices[-1].append(chunk)
            room -= len(chunk.token_ids)
        return [each for each in slices if each]

    def _pass_slice(self, chunks: Sequence[SequenceChunk]) -> PassSlice:
        specs = []
        for chunk in chunks:
            sequence = self._sequences[chunk.seq_id]
            sequence.block_ids.extend(chunk.new_block_ids)
            specs.append(
                ChunkSpec(
                    seq_id=chunk.seq_id,
                    start=chunk.start,
                    length=len(chunk.token_ids),
                    block_ids=sequence.block_ids,
                    whole=self._whole(sequence, chunk),
                )
            )
        rows, spans = self._logit_rows(chunks)
        return PassSlice(
            inputs=partial(self._inputs, chunks), specs=specs, logit_rows=rows, spans=spans
        )

    def _whole(self, sequence: _Sequence, chunk: SequenceChunk) -> int | None:
        """The length of the prompt, where ``chunk`` is to have the bits that it has as part of
        it."""
        length = len(sequence.new.prompt_token_ids)
        return length if self._is_exact and chunk.start + len(chunk.token_ids) <= length else None

    def _inputs(self, chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        """Token ids, or what the previous stage made of them."""
        if self._model.is_first:
            ids = [token for chunk in chunks for token in chunk.token_ids]
            return torch.tensor(ids, dtype=torch.long, device=self._device)
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        shape = num_tokens, self._hidden_size
        return self._link.receive(torch.empty(shape, dtype=self._dtype, device=self._device))

    def _outputs(self, parts: Sequence[PassSlice]) -> Iterator[torch.Tensor]:
        """The stage's output for one slice after the other."""
        block_size, store = self._plan.block_size, self._activations
        if len(parts) == 1:
            (whole,) = parts
            yield self._model.forward(whole.inputs(), whole.specs, block_size, whole.logit_rows)
            return
        assert store is not None, "a pass is larger than a slice"
        sizes = [part.num_tokens * self._row_bytes for part in parts]
        store.begin(sizes, self._model.num_takes)
        try:
            yield from self._model.forward_slices(parts, block_size, store)
        finally:
            for index in store.end():
                for spec in parts[index].specs:
                    end = spec.start + spec.length
                    written = slice(spec.start // block_size, -(-end // block_size))
                    blocks = spec.block_ids[written]
                    self._lost |= {CachedBlock(Tier.DEVICE, block) for block in blocks}

    def _logit_rows(
        self, chunks: Sequence[SequenceChunk]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The rows of a slice whose logits are needed, and each chunk's [start, stop) among
        them."""
        rows: list[int] = []
        spans = []
        row = 0
        for chunk in chunks:
            first = len(rows)
            wants_prompt = self._sequences[chunk.seq_id].new.sampling.prompt_logprobs is not None
            if wants_prompt:
                rows.extend(range(row, row + len(chunk.token_ids)))
            elif chunk.sample:
                rows.append(row + len(chunk.token_ids) - 1)
            spans.append((first, len(rows)))
            row += len(chunk.token_ids)
        return rows, spans

    def _sample(
        self,
        chunks: Sequence[SequenceChunk],
        logits: torch.Tensor,
        spans: Sequence[tuple[int, int]],
    ) -> tuple[list[SampledToken], dict[int, Any]]:
        picked: list[int] = []
        sampling: list[SamplingRow] = []
        prompts: dict[int, Any] = {}
        for chunk, (first, stop) in zip(chunks, spans, strict=True):
            sequence = self._sequences[chunk.seq_id]
            new = sequence.new
            if (count := new.sampling.prompt_logprobs) is not None:
                following = new.prompt_token_ids[chunk.start + 1 : chunk.start + stop - first + 1]
                if following:
                    prompts[chunk.seq_id] = tuple(
                        self._sampler.prompt_logprobs(
                            logits[first : first + len(following)], following, count
                        )
                    )
            if chunk.sample:
                picked.append(stop - 1)
                sampling.append(
                    SamplingRow(
                        params=new.sampling,
                        seq_id=chunk.seq_id,
                        seed=new.seed,
                        position=len(new.prompt_token_ids) + len(sequence.output_token_ids),
                        prompt_token_ids=new.prompt_token_ids,
                        output_token_ids=sequence.output_token_ids,
                        banned_token_ids=chunk.banned_token_ids,
                    )
                )
        if not sampling:
            return [], prompts
        chosen = logits if len(picked) == logits.shape[0] else logits[picked]
        tokens = self._sampler.sample(chosen, sampling)
        for token in tokens:
            self._sequences[token.seq_id].output_token_ids.append(token.token_id)
        return tokens, prompts

    def stats(self) -> dict[str, Any]:
        """Plain data: passes computed, bytes used by tier, bytes moved, seconds busy."""
        return {
            "passes": self._passes,
            "busy_s": self._busy_s,
            "resident_bytes": self._shard.weight_bytes(Tier.DEVICE),
            "device_used_bytes": self.device_arena.used_bytes,
            "host_used_bytes": self.host_arena.used_bytes,
            "kv_bytes_copied": {
                f"{source.value}_to_{target.value}": count
                for (source, target), count in self._kv.bytes_copied.items()
            },
            "links": [
                {
                    "kind": link.kind,
                    "source": link.source.value,
                    "target": link.target.value,
                    "bytes": totals.num_bytes,
                    "transfers": totals.num_transfers,
                    "busy_s": totals.busy_s,
                    "queue_depth": totals.queue_depth,
                    "gb_per_s": totals.num_bytes / totals.busy_s / 1e9 if totals.busy_s else 0.0,
                }
                for link, totals in self._link_totals().items()
            ],
            "stall_s": sum(moved.stall_s for moved in self._transfers()),
        }

    @property
    def keeps_trace(self) -> bool:
        return self._trace is not None

    def spans(self) -> list[dict[str, Any]]:
        """What it did when, as plain data; nothing where it keeps no trace."""
        return [] if self._trace is None else self._trace.snapshot()

    def _link_totals(self) -> dict[Link, LinkTotals]:
        return {
            link: totals for moved in self._transfers() for link, totals in moved.snapshot().items()
        }

    def _transfers(self) -> list[TransferStats]:
        """Of everything that moves."""
        moving = (self._weights, self._rotation, self._activations)
        return [each.transfers for each in moving if each is not None]

    def close(self) -> None:
        """Stop the prefetch and close the files. Idempotent."""
        self._weights.close()
        if self._rotation is not None:
            self._rotation.close()
        if self._activations is not None:
            self._activations.close()
