"""The compiled decode attention against attention written out, and against itself."""

from __future__ import annotations

import platform
import shutil

import pytest
import torch

from giantserve.models import native_library
from giantserve.models.attention import AttentionOptions, attend_decodes
from giantserve.models.batch import DecodeGroup
from giantserve.models.native_attention import NativeAttention, load_native_attention
from giantserve.models.native_library import KernelUnavailableError
from tests.models.test_attention import written_out

BLOCK_SIZE, LAYERS = 16, 3
LENGTHS = [1, 15, 16, 63, 64, 65, 256, 257, 700]
PLAIN = AttentionOptions(scaling=0.2, window=None, softcap=None, sinks=None)
KINDS = {
    "plain": PLAIN,
    "window": AttentionOptions(scaling=0.2, window=70, softcap=None, sinks=None),
    "one-token window": AttentionOptions(scaling=0.2, window=1, softcap=None, sinks=None),
    "softcap": AttentionOptions(scaling=0.2, window=None, softcap=2.0, sinks=None),
    "sinks": AttentionOptions(scaling=0.2, window=None, softcap=None, sinks=torch.randn(8)),
}


class TorchAttention:
    """What stands in for the kernel where there is none."""

    def can_attend(self, *tensors: torch.Tensor) -> bool:
        return True

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: DecodeGroup,
        options: AttentionOptions,
        out: torch.Tensor,
    ) -> None:
        out[group.rows] = attend_decodes(query[group.rows], keys, values, group, options)


Attention = NativeAttention | TorchAttention


@pytest.fixture(params=[3, 4], ids=["AVX2", "AVX-512"])
def native(request: pytest.FixtureRequest) -> NativeAttention:
    return of_level(request.param)


@pytest.fixture(params=[3, 4, None], ids=["AVX2", "AVX-512", "torch"])
def either(request: pytest.FixtureRequest) -> Attention:
    return TorchAttention() if request.param is None else of_level(request.param)


def of_level(level: int) -> NativeAttention:
    try:
        return NativeAttention(level)
    except KernelUnavailableError as error:
        told = "CPU of level" in str(error)
        if not told and shutil.which("g++") and platform.machine() == "x86_64":
            pytest.fail(f"it could be built here: {error}")
        pytest.skip(str(error))


class Case:
    """Sequences in shuffled blocks of one layer of a store; whatever is not theirs is NaN."""

    def __init__(
        self,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        dims: tuple[int, int] = (64, 64),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        used = [-(-length // BLOCK_SIZE) for length in lengths]
        shuffled = torch.randperm(sum(used) + 2, generator=generator)[: sum(used)]
        tables = torch.zeros(len(lengths), max(used), dtype=torch.long)
        elements = BLOCK_SIZE * kv_heads * sum(dims)
        store = torch.full((sum(used) + 2, LAYERS, elements), float("nan"), dtype=dtype)
        keys, values = store[:, 1].split([BLOCK_SIZE * kv_heads * dim for dim in dims], dim=1)
        self.keys = keys.unflatten(1, (BLOCK_SIZE, kv_heads, dims[0]))
        self.values = values.unflatten(1, (BLOCK_SIZE, kv_heads, dims[1]))
        self.contexts = []
        for index, blocks in enumerate(shuffled.split(used)):
            tables[index, : len(blocks)] = blocks
            found = []
            for paged, dim in ((self.keys, dims[0]), (self.values, dims[1])):
                drawn = torch.randn(lengths[index], kv_heads, dim, generator=generator).to(dtype)
                at = torch.arange(lengths[index])
                paged[blocks[at // BLOCK_SIZE], at % BLOCK_SIZE] = drawn
                found.append(drawn)
            self.contexts.append(tuple(found))
        self.query = torch.randn(len(lengths), heads, dims[0], generator=generator).to(dtype)
        self.tables = tables

    def group(self, members: list[int]) -> DecodeGroup:
        return DecodeGroup(
            rows=torch.tensor(members),
            tables=self.tables[members],
            lengths=torch.tensor(self.lengths)[members],
        )

    def found(
        self, native: Attention, options: AttentionOptions, members: list[int] | None = None
    ) -> torch.Tensor:
        """Rows that are not computed stay NaN."""
        members = list(range(len(self.lengths))) if members is None else members
        out = self.query.new_full((*self.query.shape[:2], self.values.shape[-1]), float("nan"))
        assert native.can_attend(self.query, self.keys, self.values)
        native.attend(self.query, self.keys, self.values, self.group(members), options, out)
        return out

    def expected(self, options: AttentionOptions) -> torch.Tensor:
        rows = zip(self.query.float(), self.contexts, strict=True)
        return torch.stack(
            [
                written_out(query, key.float(), value.float(), options)
                for query, (key, value) in rows
            ]
        )


@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (8, 4), (8, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attention(either: Attention, kind: str, heads: int, kv_heads: int) -> None:
    case = Case(LENGTHS, heads, kv_heads)
    options = KINDS[kind]
    torch.testing.assert_close(
        case.found(either, options), case.expected(options), rtol=1e-4, atol=2e-6
    )


@pytest.mark.parametrize("dims", [(8, 8), (20, 6), (80, 80), (96, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("heads,kv_heads", [(3, 1), (10, 2), (26, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_and_dims_of_any_even_size(
    native: NativeAttention,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
) -> None:
    case = Case([1, 30, 300], heads, kv_heads, dims, dtype)
    found, expected = case.found(native, PLAIN), case.expected(PLAIN)
    error = 2e-6 if dtype is torch.float32 else 0.0
    torch.testing.assert_close(
        found.float(), expected, rtol=2**-8 if dtype is torch.bfloat16 else 1e-4, atol=error + 1e-5
    )


def test_scores_far_apart(native: NativeAttention) -> None:
    case = Case(LENGTHS, 8, 2)
    case.query *= 1000
    found, expected = case.found(native, PLAIN), case.expected(PLAIN)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_is_not_a_number_shows_in_its_sequence_alone(either: Attention) -> None:
    case = Case([5, 300, 70], 8, 2)
    expected = case.found(either, PLAIN)
    case.keys[case.tables[1, 3], 2] = float("nan")
    found = case.found(either, PLAIN)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_the_sequence_alone(
    native: NativeAttention, dtype: torch.dtype
) -> None:
    """Neither neighbours, nor where blocks lie, nor the number of threads show in them."""
    case = Case(LENGTHS, 8, 2, dtype=dtype)
    together = case.found(native, PLAIN)
    moved = Case(LENGTHS, 8, 2, dtype=dtype, seed=1)
    for index, length in enumerate(LENGTHS):
        alone = case.found(native, PLAIN, [index])
        assert torch.equal(alone[index], together[index])
        assert alone.isnan().all(dim=(1, 2)).sum() == len(LENGTHS) - 1
        at = torch.arange(length)
        where = moved.tables[index, at // BLOCK_SIZE], at % BLOCK_SIZE
        moved.keys[where], moved.values[where] = case.contexts[index]
    moved.query = case.query
    assert torch.equal(moved.found(native, PLAIN), together)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(case.found(native, PLAIN), together)
    finally:
        torch.set_num_threads(threads)


def test_a_query_may_have_its_heads_first(native: NativeAttention) -> None:
    case = Case(LENGTHS, 8, 2)
    expected = case.found(native, PLAIN)
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(case.found(native, PLAIN), expected)


def test_what_it_cannot_attend_to(native: NativeAttention) -> None:
    case = Case([5], 2, 2, (8, 8))
    keys, values = case.keys, case.values
    assert native.can_attend(case.query, keys, values)
    assert not native.can_attend(case.query.half(), keys.half(), values.half())
    assert not native.can_attend(case.query.bfloat16(), keys, values)
    assert not native.can_attend(case.query[..., :7], keys[..., :7], values)
    assert not native.can_attend(case.query, keys, values.transpose(1, 2))
    on_meta = case.query.to("meta"), keys.to("meta"), values.to("meta")
    assert not native.can_attend(*on_meta)


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(KernelUnavailableError):
        NativeAttention(5)


def test_a_kernel_of_another_version_is_refused(
    native: NativeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_native_attention() is not None
    monkeypatch.setattr(native_library, "_VERSION", native_library._VERSION + 1)
    with pytest.raises(KernelUnavailableError, match="another version's: install"):
        NativeAttention()
    assert load_native_attention() is None


def test_without_a_kernel_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_MODULE", "giantserve.models._not_built")
    with pytest.raises(KernelUnavailableError, match=r"not built: install .* g\+\+"):
        NativeAttention()
    assert load_native_attention() is None
