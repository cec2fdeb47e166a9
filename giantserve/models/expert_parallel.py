"""The experts that one rank holds, run on the tokens that are routed to them.

T tokens, H hidden, K experts a token, P pairs of a token and an expert held here.
"""

from __future__ import annotations

import torch
from torch import nn

from giantserve.models.patching import replace_forward


def run_own_experts(experts: nn.Module, start: int, stop: int) -> None:
    """Patch ``experts``, whose parameters hold the experts [start, stop) only, to compute what
    these contribute to its output: zeros for a token routed to none of them.

    The module is called with every token once for each of its experts here, as if it had one
    expert a token, so no product is spent on foreign ones and any implementation of it will do.
    """
    compute = experts.forward
    experts.num_experts = stop - start  # type: ignore[assignment]

    def forward(
        hidden_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        tokens_P, places_P = torch.where((experts_TK >= start) & (experts_TK < stop))
        out_TKH = hidden_TH.new_zeros(*experts_TK.shape, hidden_TH.shape[-1])
        if len(tokens_P):
            out_TKH[tokens_P, places_P] = compute(
                hidden_TH[tokens_P],
                experts_TK[tokens_P, places_P].unsqueeze(1) - start,
                weights_TK[tokens_P, places_P].unsqueeze(1),
            )
        return out_TKH.sum(dim=1)

    replace_forward(experts, forward)
