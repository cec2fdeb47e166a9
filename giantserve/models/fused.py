"""RMSNorm and gated MLPs of transformers on a CPU, computed in one sweep over memory.

torch takes eight for a norm and two for a gate, each with memory of its own; the kernels of
``native/elementwise.cpp`` take a sixth of a norm's time, and three quarters of a gate's. They round
where transformers rounds; sums and exponentials may differ in fp32's last bits.
"""

from __future__ import annotations

import ctypes
from functools import partial
from types import CodeType

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from giantserve.models.native_library import KernelUnavailableError, load_kernels
from giantserve.models.patching import replace_forward

_DTYPES = (torch.bfloat16, torch.float32)
_SILU = (nn.SiLU, SiLUActivation)
_SAME_CODE = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_flags")


class FusedKernels:
    """Of tensors in memory, bf16 or fp32; on torch's own threads, as many of them as it uses."""

    def __init__(self, level: int | None = None) -> None:
        """``level`` and errors are those of `load_kernels`."""
        library, self.level = load_kernels(level)
        address, size = ctypes.c_void_p, ctypes.c_int64
        self._rms_norm, self._silu_multiply = library.rms_norm, library.silu_multiply
        how = (ctypes.c_int, ctypes.c_bool, ctypes.c_int)
        self._rms_norm.argtypes = (*[address] * 3, size, size, ctypes.c_float, *how)
        self._silu_multiply.argtypes = (address, address, size, *how)
        self._rms_norm.restype = self._silu_multiply.restype = None

    def can_compute(self, *tensors: torch.Tensor) -> bool:
        """Whether these lie in memory without gaps, and have one dtype that the kernels know."""
        dtype = tensors[0].dtype
        return dtype in _DTYPES and all(
            each.device.type == "cpu" and each.dtype is dtype and each.is_contiguous()
            for each in tensors
        )

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """``weight`` [D] times ``hidden`` [..., D] over the root of its mean square."""
        assert weight.shape == hidden.shape[-1:] and self.can_compute(hidden, weight)
        out = torch.empty_like(hidden)
        dim = hidden.shape[-1]
        rows = hidden.numel() // dim
        addresses = hidden.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._rms_norm(*addresses, rows, dim, epsilon, *self._how(hidden))
        return out

    def silu_multiply(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(``gate``) times ``up``, in the memory of ``gate``."""
        assert gate.shape == up.shape and self.can_compute(gate, up)
        self._silu_multiply(gate.data_ptr(), up.data_ptr(), gate.numel(), *self._how(gate))
        return gate

    def _how(self, tensor: torch.Tensor) -> tuple[int, bool, int]:
        return self.level, tensor.dtype is torch.bfloat16, torch.get_num_threads()


def fuse(model: nn.Module, kernels: FusedKernels | None = None) -> None:
    """Let ``kernels`` (those of this CPU; none where there are none) compute those modules of
    ``model`` whose forward does what they do, which is seen by its code, not by a list of
    architectures: most of transformers' are copies of Llama's."""
    if kernels is None:
        try:
            kernels = FusedKernels()
        except KernelUnavailableError:
            return
    for module in model.modules():
        if _runs_the_code_of(LlamaRMSNorm, module):
            replace_forward(module, partial(_norm, kernels, module))
        elif _runs_the_code_of(LlamaMLP, module) and type(module.act_fn) in _SILU:
            replace_forward(module, partial(_gated_mlp, kernels, module))


def _runs_the_code_of(reference: type[nn.Module], module: nn.Module) -> bool:
    """Whether ``module``'s forward is, instruction by instruction, that of ``reference``."""
    if "forward" in vars(module):
        return False
    code = getattr(type(module).forward, "__code__", None)
    expected: CodeType = reference.forward.__code__
    return all(getattr(code, each, None) == getattr(expected, each) for each in _SAME_CODE)


def _norm(kernels: FusedKernels, module: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    if weight.shape == hidden_states.shape[-1:] and kernels.can_compute(hidden_states, weight):
        return kernels.rms_norm(hidden_states, weight, module.variance_epsilon)
    normalised: torch.Tensor = type(module).forward(module, hidden_states)
    return normalised


def _gated_mlp(kernels: FusedKernels, module: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if kernels.can_compute(gate, up):
        states = kernels.silu_multiply(gate, up)
    else:
        states = module.act_fn(gate) * up
    down: torch.Tensor = module.down_proj(states)
    return down
