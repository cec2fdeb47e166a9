"""Split a model's modules over a tensor-parallel group, by the styles of its plan.

The parameters themselves are local slices already (see partition.sharding); what is left is where
the partial results are summed, gathered or split. Styles are those of transformers' parallel plans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from giantserve.models.collectives import TensorParallel
from giantserve.models.expert_parallel import run_own_experts
from giantserve.models.linear import product
from giantserve.models.patching import replace_forward
from partition.parallel_plan import EXPERT_MODULE
from partition.profile import ModelProfile
from partition.sharding import Deal, ShardRule, deal_ranges


def parallelise(model: nn.Module, profile: ModelProfile, group: TensorParallel) -> None:
    """Patch the modules of ``model`` that ``profile.styles`` names."""
    if group.world == 1:
        return
    rules = {spec.name: spec for unit in profile.units for spec in unit.parameters}
    head = model.get_output_embeddings()  # type: ignore[operator]
    for path, style in profile.styles.items():
        patch = _PATCHES.get(style)
        if patch is None or path in rules:
            continue
        module = model.get_submodule(path)
        if module is head:
            continue
        leaves = (f"{path}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
        spec = next((rules[name] for name in leaves if name in rules), None)
        shape, rule = (spec.shape, spec.rule) if spec else ((), None)
        patch(module, _Portions(profile, group, shape, rule))
    if head is not None:  # split by vocabulary, like the embedding that it may be tied to
        _gather_output(head, _Portions(profile, group, (profile.vocab_size,), ShardRule(dim=0)))
    if _has_unaligned_experts(profile, group):
        model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    if profile.kv_sharded:
        _localise_head_counts(model, profile, group)


def _has_unaligned_experts(profile: ModelProfile, group: TensorParallel) -> bool:
    """Whether a rank's slice of the experts is one that torch's grouped product refuses: its rows
    must be multiples of 16 bytes."""
    return any(
        spec.local_shape(profile.heads, rank, group.world)[-1] * spec.dtype_bytes % 16
        for unit in profile.units
        for spec in unit.parameters
        if spec.num_experts > 1
        for rank in range(group.world)
    )


class _Portions:
    """Which part of a module's split dimension each rank of the group holds."""

    def __init__(
        self,
        profile: ModelProfile,
        group: TensorParallel,
        shape: tuple[int, ...],
        rule: ShardRule | None,
    ) -> None:
        self.group = group
        self._profile = profile
        self._shape = shape
        self._rule = rule or ShardRule(dim=0, deal=Deal.EVEN)

    def of(self, rank: int) -> tuple[int, int]:
        size = self._shape[self._rule.dim]
        ranges = deal_ranges(self._rule, size, self._profile.heads, rank, self.group.world)
        return ranges[0]

    @property
    def own(self) -> tuple[int, int]:
        return self.of(self.group.rank)

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in map(self.of, range(self.group.world))]


def _sum_output(module: nn.Module, portions: _Portions) -> None:
    """rowwise: inputs are split already; sum the partial products, then add the bias once."""
    if not isinstance(module, nn.Linear):
        _sum_whole_output(module, portions)
        return

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        out = portions.group.all_reduce(product(module, hidden))
        return out if module.bias is None else out + module.bias

    replace_forward(module, forward)


def _sum_split_input(module: nn.Module, portions: _Portions) -> None:
    """rowwise_split_input: the whole input is here; take our columns of it first."""
    start, stop = portions.own
    _sum_output(module, portions)
    summed = module.forward
    replace_forward(module, lambda hidden: summed(hidden[..., start:stop]))


def _gather_output(module: nn.Module, portions: _Portions) -> None:
    """colwise_gather_output: every rank gets the whole output."""
    sizes = portions.sizes

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.Linear)
        out = product(module, hidden)
        return portions.group.all_gather(out if module.bias is None else out + module.bias, sizes)

    replace_forward(module, forward)


def _sum_whole_output(module: nn.Module, portions: _Portions) -> None:
    """moe_tp_experts: each rank ran its part of every expert; sum."""
    partial = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return portions.group.all_reduce(partial(*args, **kwargs))

    replace_forward(module, forward)


def _sum_own_experts(module: nn.Module, portions: _Portions) -> None:
    """ep_dispatch_experts: each rank ran the experts that it holds; sum."""
    run_own_experts(module, *portions.own)
    _sum_whole_output(module, portions)


_PATCHES: dict[str, Callable[[nn.Module, _Portions], None]] = {
    "rowwise": _sum_output,
    "rowwise_split_input": _sum_split_input,
    "colwise_gather_output": _gather_output,
    "moe_tp_experts": _sum_whole_output,
    EXPERT_MODULE: _sum_own_experts,
}


def _localise_head_counts(model: nn.Module, profile: ModelProfile, group: TensorParallel) -> None:
    """Attention modules that reshape by a stored head count get their own rank's."""
    start, stop = profile.heads.query_range(group.rank, group.world)
    kv_start, kv_stop = profile.heads.key_value_range(group.rank, group.world)
    for module in model.modules():
        if not hasattr(module, "layer_idx"):
            continue
        for name in ("num_heads", "num_attention_heads"):
            if getattr(module, name, None) == profile.heads.query:
                setattr(module, name, stop - start)
        if getattr(module, "num_key_value_heads", None) == profile.heads.key_value:
            module.num_key_value_heads = kv_stop - kv_start  # type: ignore[assignment]
