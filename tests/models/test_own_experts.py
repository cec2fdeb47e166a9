"""Experts dealt out over ranks: the parts sum to the whole, and no rank computes for another."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from giantserve.models.expert_parallel import run_own_experts

EXPERTS, HIDDEN, INTER, TOKENS, CHOSEN = 8, 16, 32, 11, 3
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTER, "num_local_experts": EXPERTS}
DEALS = ([(0, 8)], [(0, 4), (4, 8)], [(0, 2), (2, 5), (5, 8)])
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def make_experts(kind: type[nn.Module], implementation: str) -> nn.Module:
    config = MixtralConfig(**SIZES) if kind is MixtralExperts else GptOssConfig(**SIZES)
    config._experts_implementation = implementation
    experts = kind(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return experts


def dealt(
    kind: type[nn.Module], implementation: str, start: int, stop: int
) -> tuple[nn.Module, list[int]]:
    """One rank's experts, and a list that grows by the number of rows of each product."""
    experts = make_experts(kind, implementation)
    for parameter in experts.parameters():
        parameter.data = parameter.data[start:stop].clone()
    rows: list[int] = []
    compute = experts.forward

    def counted(hidden: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return compute(hidden, *args)  # type: ignore[no-any-return]

    experts.__dict__["forward"] = counted
    run_own_experts(experts, start, stop)
    return experts, rows


def routed(num_experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(TOKENS, num_experts, generator=generator)
    weights, chosen = scores.topk(CHOSEN)
    return torch.randn(TOKENS, HIDDEN, generator=generator), chosen, weights


@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("deal", DEALS)
@torch.no_grad()
def test_parts_sum_to_the_whole(
    kind: type[nn.Module], implementation: str, deal: list[tuple[int, int]]
) -> None:
    hidden, chosen, weights = routed()
    whole = make_experts(kind, implementation)(hidden, chosen, weights)
    total = torch.zeros_like(whole)
    for start, stop in deal:
        experts, rows = dealt(kind, implementation, start, stop)
        total += experts(hidden, chosen, weights)
        assert rows == [int(((chosen >= start) & (chosen < stop)).sum())]
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_rank_without_a_routed_token_computes_nothing() -> None:
    hidden, chosen, weights = routed(num_experts=5)
    experts, rows = dealt(MixtralExperts, "grouped_mm", 5, 8)
    assert torch.equal(experts(hidden, chosen, weights), torch.zeros(TOKENS, HIDDEN))
    assert rows == []
