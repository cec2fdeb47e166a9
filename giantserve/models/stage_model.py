"""One stage of a transformers model: its layers, its share of every parameter, its weights by unit.

The modules are transformers' own. Layers of other stages become pass-throughs, what stands before
the layers on a later stage becomes inert, and the parameters are views that the weight manager
hands out.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from giantserve.models.attention import PagedAttention
from giantserve.models.batch import ChunkSpec
from giantserve.models.caches import GatheringCache, PassThroughCache
from giantserve.models.collectives import TensorParallel
from giantserve.models.fused import fuse
from giantserve.models.linear import can_pack, pack, pack_later
from giantserve.models.pass_kv import PassKV, rotating
from giantserve.models.patching import replace_forward
from giantserve.models.pruning import (
    empty,
    materialise_buffers,
    parameter_slots,
    path_of,
    silence_inputs,
)
from giantserve.models.tensor_parallel import parallelise
from kvcache.activations import ActivationStore
from kvcache.arena import Arena
from kvcache.kv_rotation import KVRotation
from kvcache.kv_store import KVStore
from kvcache.trace import Trace
from partition.meta_model import ATTENTION_NAME, bind_attention, build_meta_model, find_layers
from partition.profile import AttentionKind, ModelProfile, Unit, UnitKind


class Weights(Protocol):
    """Where the stage gets its tensors from (kvcache.weights.WeightManager)."""

    whole_experts: bool

    @property
    def is_loaded(self) -> bool: ...
    def acquire(self, unit: str) -> dict[str, torch.Tensor]: ...
    def acquire_experts(self, unit: str, experts: Sequence[int]) -> None: ...
    def release(self, unit: str) -> None: ...
    def gather_rows(self, unit: str, tensor: str, ids: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSlice:
    """Tokens of a pass that go through a layer together: whole chunks, the rows whose logits are
    wanted, and each chunk's [start, stop) among these. ``inputs`` gives the token ids [T] or hidden
    states [T, H] when the first layer comes to them."""

    inputs: Callable[[], torch.Tensor]
    specs: list[ChunkSpec]
    logit_rows: list[int]
    spans: list[tuple[int, int]]

    @property
    def num_tokens(self) -> int:
        return sum(spec.length for spec in self.specs)


class _Part(NamedTuple):
    """Chunks that one call of the model computes: their rows, and those of them whose logits are
    wanted."""

    kv: PassKV
    rows: slice
    logit_rows: list[int]


class _StageDone(Exception):
    """Raised by the last layer that is to run, to leave the model's forward with the hidden
    states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class StageModel:
    """Runs one stage for a flat batch of tokens.

    ``forward`` takes token ids [T] on the first stage, hidden states [T, H] on the others; it
    returns hidden states [T, H], or on the last stage logits [R, vocab] of the rows asked for.
    """

    def __init__(
        self,
        config: Any,
        profile: ModelProfile,
        first_layer: int,
        end_layer: int,
        group: TensorParallel,
        device: torch.device,
    ) -> None:
        self.profile = profile
        self.units = profile.stage_units(first_layer, end_layer)
        self.is_first = first_layer == 0
        self.is_last = end_layer == profile.num_layers
        self._device = device
        self._generic = profile.attention is AttentionKind.GENERIC
        self.model: PreTrainedModel = build_meta_model(
            config, "eager" if self._generic else ATTENTION_NAME
        )
        _, layers = find_layers(self.model, profile.num_layers)
        self._layers = layers
        self._group = group
        parallelise(self.model, profile, group)
        self._prune(first_layer, end_layer)
        materialise_buffers(self.model, device)
        self._accepts_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._slots = parameter_slots(self.model, self.units)
        self._kinds = {unit.name: unit.kind for unit in self.units}
        self._waits: list[RemovableHandle] = []
        self.layers_run = 0
        """How many layers were called: grows while a pass gets on."""
        self._span = first_layer, end_layer
        self._window = self._span
        self._ends_early = not self.is_last
        self._injected: torch.Tensor | None = None
        self._held: list[str] = []
        self._holds_all = False
        self._current: str | None = None
        self._attention: PagedAttention | None = None
        self._kv: KVStore | None = None
        self._rotation: KVRotation | None = None
        self._weights: Weights | None = None
        self._trace: Trace | None = None
        self._entered_s = 0.0

    # Preparing

    def _prune(self, first_layer: int, end_layer: int) -> None:
        for index, layer in enumerate(self._layers):
            forward = layer.forward
            if not first_layer <= index < end_layer:
                empty(layer)
            replace_forward(layer, self._in_window(index, forward))
        if not self.is_first:
            silence_inputs(self.model, self.profile)

    def _in_window(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The layer's forward where it is among those to run now, else a pass-through; the one
        before the first of them brings the states in."""
        num_outputs = self.profile.layer_outputs

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            first, end = self._window
            if first <= index < end:
                self.layers_run += 1
                output = forward(hidden_states, *args, **kwargs)
                if self._ends_early and index == end - 1:
                    raise _StageDone(output[0] if isinstance(output, tuple) else output)
                return output
            states = self._injected if index == first - 1 else hidden_states
            return (states, *[None] * (num_outputs - 1)) if num_outputs else states

        return run

    def attach(
        self,
        weights: Weights,
        kv: KVStore,
        resident: set[str],
        rotation: KVRotation | None = None,
        trace: Trace | None = None,
        *,
        exact_attention: bool = False,
    ) -> None:
        """Connect the stage to its bytes. ``resident`` units stay on the device: `take_resident`
        binds each once, the vectors of `units_bound_first` before a pass, and a pass that needs
        another waits for it. ``rotation`` holds the blocks beyond those of ``kv``.
        ``exact_attention``: as in `EngineConfig`."""
        self._weights, self._kv, self._rotation, self._trace = weights, kv, rotation, trace
        self._attention = PagedAttention(exact=exact_attention)
        bind_attention(self.model, self._attention)
        if self._device.type == "cpu" and not exact_attention:
            fuse(self.model)
        for unit in self.units:
            if unit.name in resident:
                if unit.kind in (UnitKind.ATTENTION, UnitKind.MLP, UnitKind.HEAD):
                    for module in self._entries(unit):
                        if type(module) is nn.Linear:
                            pack_later(module)
                        hook = module.register_forward_pre_hook(self._awaiting(unit.name))
                        self._waits.append(hook)
            elif unit.kind is not UnitKind.EMBEDDING:
                for module in self._entries(unit):
                    module.register_forward_pre_hook(self._entering(unit.name))
                self._hook_experts(unit)
        if self.is_first:
            self._hook_embedding()

    @property
    def units_bound_first(self) -> set[str]:
        """What is there before a pass begins: vectors, which any part of the model may read."""
        return {unit.name for unit in self.units if unit.kind is UnitKind.SMALL}

    @torch.no_grad()
    def take_resident(self, unit: str, tensors: dict[str, torch.Tensor], arena: Arena) -> None:
        """Bind a unit that stays on the device, and pack it for the CPU where that has a layout of
        its own. ``tensors`` lie in ``arena``. From any thread, before a pass gets the unit."""
        if self._kinds[unit] is UnitKind.EMBEDDING:
            return
        self._bind(unit, tensors)
        embedding = path_of(self.model, self.model.get_input_embeddings()) + ".weight"
        for module, leaf, name in self._slots[unit]:
            is_read_by_rows = self.is_first and name == embedding
            if leaf == "weight" and not is_read_by_rows and can_pack(module, tensors[name]):
                pack(module, tensors[name], arena)  # type: ignore[arg-type]

    def _awaiting(self, unit: str) -> Callable[[nn.Module, Any], None]:
        def wait(module: nn.Module, args: Any) -> None:
            assert self._weights is not None
            self._weights.acquire(unit)

        return wait

    def _stop_waiting(self) -> None:
        """Once all weights are there, no module need ask."""
        if self._waits and self._weights is not None and self._weights.is_loaded:
            for hook in self._waits:
                hook.remove()
            self._waits.clear()

    def _entries(self, unit: Unit) -> list[nn.Module]:
        """The modules whose call begins the use of ``unit``: a layer's children, or the head."""
        paths = {spec.name for spec in unit.parameters}
        if unit.kind is UnitKind.HEAD:
            return [self.model.get_output_embeddings()]
        layer = self._layers[unit.layer]  # type: ignore[index]
        prefix = path_of(self.model, layer)
        return [
            child
            for name, child in layer.named_children()
            if any(path.startswith(f"{prefix}.{name}.") for path in paths)
        ]

    def _entering(self, unit: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._use(unit)

    def _hook_experts(self, unit: Unit) -> None:
        """Once a pass is routed, bring the experts that it needs."""
        routed = filter(self.profile.is_routed, unit.parameters)
        for path, spec in {spec.name.rpartition(".")[0]: spec for spec in routed}.items():
            first, stop = 0, spec.num_experts
            if self.profile.expert_parallel and spec.rule is not None:
                heads, group = self.profile.heads, self._group
                ((first, stop),) = spec.ranges(heads, group.rank, group.world)
            self.model.get_submodule(path).register_forward_pre_hook(
                self._routed(unit.name, first, stop), with_kwargs=True
            )

    def _routed(self, unit: str, first: int, stop: int) -> Callable[..., None]:
        def fetch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self._weights is not None
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            routes = next((t for t in given if not t.is_floating_point()), None)
            if routes is None:  # it runs every token through every expert
                experts = list(range(stop - first))
            else:
                found: list[int] = torch.unique(routes).tolist()
                experts = [expert - first for expert in found if first <= expert < stop]
            self._weights.acquire_experts(unit, experts)

        return fetch

    def _use(self, unit: str) -> None:
        if unit == self._current:
            return
        assert self._weights is not None
        self._trace_current()
        if not self._holds_all:
            self._leave()
        if unit not in self._held:
            self._bind(unit, self._weights.acquire(unit))
            self._held.append(unit)
        self._current, self._entered_s = unit, time.perf_counter()

    def _trace_current(self) -> None:
        if self._trace is not None and self._current is not None:
            self._trace.add("computes with", self._current, self._entered_s)
        self._current = None

    def _leave(self) -> None:
        assert self._weights is not None
        self._trace_current()
        while self._held:
            self._weights.release(self._held.pop())

    def _bind(self, unit: str, tensors: dict[str, torch.Tensor]) -> None:
        for module, leaf, name in self._slots[unit]:
            tensor = tensors[name]
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _hook_embedding(self) -> None:
        """Look the pass's rows up wherever the matrix lies, and let the module see only those."""
        embedding = self.model.get_input_embeddings()
        name = path_of(self.model, embedding) + ".weight"
        unit, spec = next(
            (unit, spec)
            for unit in reversed(self.units)
            for spec in unit.parameters
            if spec.name == name
        )
        embedding.padding_idx = None
        bounds = None
        if self._group.world > 1 and spec.rule is not None:
            ((start, stop),) = spec.ranges(self.profile.heads, self._group.rank, self._group.world)
            bounds = (start, stop)

        def rows(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            ids = args[0]
            module._parameters["weight"] = nn.Parameter(
                self._embedding_rows(unit.name, name, ids.flatten(), bounds), requires_grad=False
            )
            return (torch.arange(ids.numel(), device=ids.device).view_as(ids), *args[1:])

        embedding.register_forward_pre_hook(rows)

    def _embedding_rows(
        self, unit: str, name: str, ids: torch.Tensor, bounds: tuple[int, int] | None
    ) -> torch.Tensor:
        assert self._weights is not None
        if bounds is None:
            return self._weights.gather_rows(unit, name, ids)
        start, stop = bounds
        outside = (ids < start) | (ids >= stop)
        local = (ids - start).masked_fill(outside, 0)
        rows = self._weights.gather_rows(unit, name, local)
        rows = rows.masked_fill(outside[:, None], 0)
        return self._group.all_reduce(rows)

    # Running

    @torch.no_grad()
    def forward(
        self, inputs: torch.Tensor, specs: list[ChunkSpec], block_size: int, logit_rows: list[int]
    ) -> torch.Tensor:
        """Run the stage for the chunks ``specs``, laid one after the other in ``inputs``."""
        assert self._weights is not None
        self._stop_waiting()
        self._weights.whole_experts = self.profile.reads_whole_experts(inputs.shape[0])
        outputs = []
        for part in self._parts(specs, block_size, logit_rows):
            with rotating(self._rotation, [part.kv]):
                try:
                    outputs.append(self._run(inputs[part.rows], part.kv, part.logit_rows))
                finally:
                    self._leave()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @torch.no_grad()
    def forward_slices(
        self, slices: Sequence[PassSlice], block_size: int, store: ActivationStore
    ) -> Iterator[torch.Tensor]:
        """What `forward` returns, of one slice after the other. Each layer sees all slices before
        the next one begins, and its weights are held meanwhile; between layers the states lie in
        ``store``, for which the caller begins and ends the pass."""
        assert self._weights is not None
        self._stop_waiting()
        num_tokens = sum(each.num_tokens for each in slices)
        self._weights.whole_experts = self.profile.reads_whole_experts(num_tokens)
        parts = [self._parts(each.specs, block_size, each.logit_rows) for each in slices]
        first, end = self._span
        self._holds_all = True
        try:
            with rotating(self._rotation, [part.kv for of in parts for part in of]):
                for layer in range(first, end):
                    self._window, self._ends_early = (layer, layer + 1), True
                    for index, each in enumerate(slices):
                        inputs = each.inputs() if layer == first else store.take(index)
                        outputs = [self._run(inputs[p.rows], p.kv, []) for p in parts[index]]
                        states = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
                        if layer + 1 < end or self.is_last:
                            store.put(index, states)
                        else:
                            yield states
                    self._leave()
                if self.is_last:
                    self._window, self._ends_early = (end, end), False
                    for index in range(len(slices)):
                        states = store.take(index)
                        yield torch.cat(
                            [self._run(states[p.rows], p.kv, p.logit_rows) for p in parts[index]]
                        )
        finally:
            self._holds_all = False
            self._window, self._ends_early = self._span, not self.is_last
            self._leave()

    @property
    def num_takes(self) -> int:
        """How often `forward_slices` takes each slice's states from the store."""
        first, end = self._span
        return end - first - 1 + self.is_last

    def _parts(self, specs: list[ChunkSpec], block_size: int, logit_rows: list[int]) -> list[_Part]:
        """All chunks as one; each by itself for models with an attention of their own, which takes
        one sequence and a dense mask."""
        assert self._kv is not None
        gathered = self.profile.attention is not AttentionKind.PAGED
        parts = []
        row = 0
        for chunks in [[spec] for spec in specs] if self._generic else [specs]:
            rows = slice(row, row + sum(spec.length for spec in chunks))
            kv = PassKV(
                self._kv, self._rotation, chunks, block_size, self._device, gathered=gathered
            )
            wanted = [r - row for r in logit_rows if rows.start <= r < rows.stop]
            parts.append(_Part(kv=kv, rows=rows, logit_rows=wanted))
            row = rows.stop
        return parts

    def _run(self, inputs: torch.Tensor, kv: PassKV, logit_rows: list[int]) -> torch.Tensor:
        """The layers of the window, and what follows them where they do not end early."""
        mask = None
        if self._generic:
            (spec,) = kv.batch.specs
            mask = torch.ones(1, spec.start + spec.length, dtype=torch.long, device=self._device)
        paged = self.profile.attention is AttentionKind.PAGED
        arguments: dict[str, Any] = {
            "position_ids": kv.batch.positions.unsqueeze(0),
            "attention_mask": mask,
            "past_key_values": PassThroughCache() if paged else GatheringCache(kv),
            "use_cache": True,
        }
        if self._window[0] == 0:
            arguments["input_ids"] = inputs.unsqueeze(0)
        else:
            self._injected = inputs.unsqueeze(0)
            arguments["inputs_embeds"] = self._injected
        rows = torch.tensor(logit_rows, dtype=torch.long, device=self._device)
        if self._accepts_rows and not self._ends_early:
            arguments["logits_to_keep"] = rows
        assert self._attention is not None
        self._attention.kv = kv
        try:
            logits: torch.Tensor = self.model(**arguments).logits[0]
        except _StageDone as done:
            return done.hidden[0]
        finally:
            self._attention.kv = None
            self._injected = None
        return logits if self._accepts_rows else logits[rows]
