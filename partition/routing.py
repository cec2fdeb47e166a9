"""How many of a layer's experts a pass needs."""

from __future__ import annotations

WHOLE_SHARE = 0.9
"""Above this share all of a layer's experts are read ahead: leaving out the few that no token is
routed to would mean to wait for the router first."""


def distinct_experts(num_experts: int, per_token: int, num_tokens: int) -> float:
    """Expected number of distinct experts that a pass routes to: E (1 - (1 - k/E)^n).

    Each token takes k of E experts; with independent uniform routing an expert is missed by one
    token with probability 1 - k/E (the occupancy bound used by MoE-Lightning and MoE-Lens).
    """
    return float(num_experts * (1 - (1 - per_token / num_experts) ** num_tokens))
