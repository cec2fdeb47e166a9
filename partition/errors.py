"""The planner's errors. All are mistakes of the input, and say what would mend them."""

from __future__ import annotations


class PlanError(ValueError):
    """No plan exists for this model, cluster and constraints; the message names the nearest that does."""

    status_code = 400


class UnsupportedArchitectureError(PlanError):
    """The model cannot run, or cannot be split the way that was asked; the message says why."""
