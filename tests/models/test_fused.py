"""The fused norms and gated MLPs against the modules of transformers whose place they take."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from giantserve.models.collectives import TensorParallel
from giantserve.models.fused import FusedKernels, fuse
from giantserve.models.native_library import KernelUnavailableError
from giantserve.models.stage_model import StageModel
from partition.profile import ModelProfile

WIDTHS = [1, 7, 16, 31, 33, 64, 100, 2048]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[3, 4], ids=["AVX2", "AVX-512"])
def kernels(request: pytest.FixtureRequest) -> FusedKernels:
    try:
        return FusedKernels(request.param)
    except KernelUnavailableError as error:
        told = "CPU of level" in str(error)
        if not told and shutil.which("g++") and platform.machine() == "x86_64":
            pytest.fail(f"it could be built here: {error}")
        pytest.skip(str(error))


def norm(
    width: int, dtype: torch.dtype, kind: Callable[..., nn.Module] = LlamaRMSNorm
) -> nn.Module:
    module = kind(width, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight)
    return module.requires_grad_(False)


def mlp(width: int, dtype: torch.dtype, act: str = "silu") -> LlamaMLP:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=width, hidden_act=act, mlp_bias=False
    )
    return LlamaMLP(config).to(dtype).requires_grad_(False)


def fused(module: nn.Module, kernels: FusedKernels) -> nn.Module:
    fuse(module, kernels)
    assert "forward" in vars(module)
    return module


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """In bf16 the same bits, but for one element in a thousand that is rounded the other way."""
    assert found.dtype is expected.dtype and found.shape == expected.shape
    if found.dtype is torch.bfloat16:
        assert (found != expected).sum() <= max(1, found.numel() // 1000)
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=0)
    else:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm(kernels: FusedKernels, dtype: torch.dtype, width: int) -> None:
    module = norm(width, dtype)
    hidden = (torch.randn(3, 67, width) * 10).to(dtype)
    before = hidden.clone()
    expected = module(hidden)
    assert_same(fused(module, kernels)(hidden), expected)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_gate(kernels: FusedKernels, dtype: torch.dtype, width: int) -> None:
    gate, up = (torch.randn(67, width) * 10).to(dtype), torch.randn(67, width).to(dtype)
    expected = nn.functional.silu(gate) * up
    assert_same(kernels.silu_multiply(gate, up), expected)


def test_the_ends_of_the_range(kernels: FusedKernels) -> None:
    inf = float("inf")
    gate = torch.tensor([0.0, -0.0, 1e-30, 80.0, -80.0, 1e30, inf, float("nan")])
    expected = nn.functional.silu(gate)
    found = kernels.silu_multiply(gate.clone(), torch.ones(8))
    torch.testing.assert_close(found, expected, equal_nan=True)
    rows = torch.zeros(3, 8)
    rows[1, 3], rows[2, 3] = inf, float("nan")
    module = norm(8, torch.float32)
    expected = module(rows)
    torch.testing.assert_close(fused(module, kernels)(rows), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_see_its_neighbours(kernels: FusedKernels, dtype: torch.dtype) -> None:
    module = fused(norm(1000, dtype), kernels)
    hidden, up = torch.randn(40, 1000).to(dtype), torch.randn(40, 1000).to(dtype)
    together, gated = module(hidden), kernels.silu_multiply(hidden.clone(), up)
    for row in range(40):
        assert torch.equal(module(hidden[row]), together[row])
        assert torch.equal(kernels.silu_multiply(hidden[row].clone(), up[row]), gated[row])


def test_no_rows(kernels: FusedKernels) -> None:
    assert fused(norm(8, torch.float32), kernels)(torch.empty(1, 0, 8)).shape == (1, 0, 8)
    assert kernels.silu_multiply(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gated_mlp(kernels: FusedKernels, dtype: torch.dtype) -> None:
    module = mlp(96, dtype)
    hidden = torch.randn(1, 5, 32).to(dtype)
    expected = module(hidden)
    torch.testing.assert_close(fused(module, kernels)(hidden), expected)


def test_what_the_kernels_do_not_know_is_computed_as_before(kernels: FusedKernels) -> None:
    for module in (norm(32, torch.float16), mlp(64, torch.float16), norm(32, torch.float32)):
        dtype = next(module.parameters()).dtype
        hidden = torch.randn(32, 5).to(dtype).t()  # has gaps
        expected = module(hidden)
        assert torch.equal(fused(module, kernels)(hidden), expected)
    mixed = norm(32, torch.float32)
    hidden = torch.randn(5, 32).bfloat16()
    expected = mixed(hidden)
    assert expected.dtype is torch.float32
    assert torch.equal(fused(mixed, kernels)(hidden), expected)


def test_a_module_is_known_by_its_code(kernels: FusedKernels) -> None:
    assert "forward" in vars(fused(norm(8, torch.float32, Qwen3RMSNorm), kernels))
    others = [norm(8, torch.float32, GptOssRMSNorm), mlp(8, torch.float32, "gelu"), nn.Linear(8, 8)]

    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    class Negated(nn.SiLU):
        def forward(self, gate: torch.Tensor) -> torch.Tensor:
            return -super().forward(gate)

    others.append(norm(8, torch.float32, Doubled))
    others.append(mlp(8, torch.float32))
    others[-1].act_fn = Negated()
    for module in others:
        fuse(module, kernels)
        assert "forward" not in vars(module)


def test_hooks_run_before_a_weight_is_read(kernels: FusedKernels) -> None:
    module = norm(8, torch.float32)
    hidden = torch.randn(2, 8)
    expected = module(hidden)
    weight, module.weight = module.weight, nn.Parameter(torch.empty(0))

    def bind(module: nn.Module, args: object) -> None:
        module.weight = weight

    fused(module, kernels).register_forward_pre_hook(bind)
    assert_same(module(hidden), expected)


def test_without_kernels_a_module_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("giantserve.models.native_library._MODULE", "giantserve.models._not_built")
    module = norm(8, torch.float32)
    fuse(module)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("exact", [False, True])
def test_a_stage_is_fused_unless_it_is_to_be_exact(kernels: FusedKernels, exact: bool) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=16,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    profile = ModelProfile.from_config(config)
    stage = StageModel(config, profile, 0, 1, TensorParallel(), torch.device("cpu"))
    stage.attach(None, None, set(), exact_attention=exact)
    (layer, _), last = stage.model.model.layers, stage.model.model.norm
    for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, last):
        assert ("forward" in vars(module)) == (not exact)


def test_this_cpus_kernels_are_taken_where_none_are_given(kernels: FusedKernels) -> None:
    module = norm(8, torch.float32)
    fuse(module)
    assert "forward" in vars(module)
