"""Serve language models that do not fit the accelerators you have.

Names are loaded when first used, so that the client and the command line start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from giantserve.config import EngineConfig
    from giantserve.llm import LLM
    from giantserve.outputs import RequestOutput
    from giantserve.sampling_params import SamplingParams

__all__ = ["LLM", "EngineConfig", "RequestOutput", "SamplingParams", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "giantserve.llm",
    "EngineConfig": "giantserve.config",
    "RequestOutput": "giantserve.outputs",
    "SamplingParams": "giantserve.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
