"""The compiled kernels of ``native/``: a C library, and the instructions that this CPU has for it.

It is built when giantserve is installed; where it could not be, torch computes in its place.
"""

from __future__ import annotations

import ctypes
import importlib.util

import torch  # noqa: F401  (its OpenMP library is the kernels', too)

_MODULE = "giantserve.models._kernels"
_VERSION = 1
"""Of what the functions expect: as in ``native/paged_attention.cpp``."""


class KernelUnavailableError(Exception):
    """Why the kernels cannot be used here."""


def load_kernels(level: int | None = None) -> tuple[ctypes.CDLL, int]:
    """The library, and the ``level`` of x86-64's instructions that its functions are to be called
    with, 3 (AVX2) or 4 (AVX-512); None: the CPU's best. Raises KernelUnavailableError."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise KernelUnavailableError(
            "the kernels were not built: install giantserve again where g++ is"
        )
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        raise KernelUnavailableError(f"the kernels cannot be loaded: {error}") from None
    if not hasattr(library, "kernels_version") or library.kernels_version() != _VERSION:
        raise KernelUnavailableError("the kernels are another version's: install giantserve again")
    best: int = library.best_level()
    if not best or best < (level or 0):
        raise KernelUnavailableError(f"the kernels need a CPU of level {level or 3} (AVX2 is 3)")
    return library, level or best
