"""Give one module instance another forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make calls of ``module`` run ``forward``; its class and its hooks stay as they are."""
    module.__dict__["forward"] = forward
