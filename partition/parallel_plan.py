"""Which parallel style each module of a model has: tensor parallel from the config's plan or
DeepSpeed's AutoTP, expert parallel from the config's plan."""

from __future__ import annotations

import re

from torch import nn

SPLIT_STYLES = ("colwise", "rowwise")
REPLICATED_STYLES = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params")
KNOWN_STYLES = (
    *SPLIT_STYLES,
    *REPLICATED_STYLES,
    "colwise_gather_output",
    "rowwise_split_input",
    "packed_colwise",
    "moe_tp_experts",
    "embedding_rowwise",
)

EXPERT_PARAMETERS = "grouped_gemm"
EXPERT_MODULE = "ep_dispatch_experts"


def tensor_parallel_styles(model: nn.Module, layers_path: str) -> tuple[dict[str, str], str | None]:
    """Styles by module or parameter path, and why the model cannot be split (None where it can)."""
    plan = {
        pattern: style
        for pattern, style in (getattr(model, "_tp_plan", None) or {}).items()
        if style not in REPLICATED_STYLES
    }
    if not any(".*." in f".{pattern}." for pattern in plan):
        return _derived(model, layers_path)
    unknown = sorted({style for style in plan.values() if style not in KNOWN_STYLES})
    if unknown:
        return {}, f"its plan asks for {', '.join(unknown)}, which is not implemented"
    return _matching(model, plan), None


def expert_parallel_styles(model: nn.Module) -> dict[str, str]:
    """The experts by module and parameter path, where the model's plan deals out whole ones: the
    modules (`EXPERT_MODULE`) are called with tokens, indices of experts and their weights, the
    parameters (`EXPERT_PARAMETERS`) count experts in their first dimension."""
    plan = getattr(model, "_ep_plan", None) or {}
    styles = (EXPERT_PARAMETERS, EXPERT_MODULE)
    return _matching(model, {path: style for path, style in plan.items() if style in styles})


def _matching(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    paths = [name for name, _ in model.named_modules()]
    paths += [name for name, _ in model.named_parameters()]
    return {path: plan[_pattern(path)] for path in paths if _pattern(path) in plan}


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _derived(model: nn.Module, layers_path: str) -> tuple[dict[str, str], str | None]:
    """DeepSpeed's AutoTP names the linears whose outputs are summed; the others of a layer are
    split by their outputs."""
    from deepspeed.module_inject.auto_tp import AutoTP

    name = type(model).__name__
    try:
        found = AutoTP.tp_parser(model)
    except AssertionError:
        return {}, f"{name} has no tensor-parallel plan and AutoTP derives none"
    summed = tuple(suffix.lstrip(".") for _, suffixes in found for suffix in suffixes)
    styles: dict[str, str] = {}
    for path, module in model.get_submodule(layers_path).named_modules():
        if not isinstance(module, nn.Linear):
            continue
        is_summed = bool(summed) and path.endswith(summed)
        styles[f"{layers_path}.{path}"] = "rowwise" if is_summed else "colwise"
    if not summed or "rowwise" not in styles.values():
        return {}, f"{name} has no tensor-parallel plan and AutoTP derives none"
    return styles, None
