"""Cached prefixes that outlive their engine: found again, and never trusted further than their
checksums."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from giantserve import LLM, SamplingParams
from giantserve.errors import ConfigError, EngineDeadError
from giantserve.executor.launcher import Launcher
from kvcache.kept_index import KeptIndex
from tests.exactness.zoo import reference, save_model

NUM_TOKENS = 12
PROMPTS = [[3 + i, 5, 7 + i, 11] * 12 + [20 + i] for i in range(4)]
OTHERS = [[13 + i, 6, 8 + i, 17] * 12 for i in range(24)]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
NUM_CACHED = 48
"""Tokens of a prompt in full blocks, but for the last token, which is computed always."""


@pytest.fixture
def start(pristine: Path, tmp_path: Path, launcher: Launcher) -> Callable[..., LLM]:
    """Engines over one folder, one after the other."""

    def starts(model: Path = pristine, **options: Any) -> LLM:
        given = {
            "device_memory": "64MiB",
            "host_memory": "8MiB",
            "prefix_memory": "8MiB",
            "tensor_parallel": 1,
            "pipeline_parallel": 1,
            "max_model_len": 96,
            "max_num_seqs": 4,
            **options,
        }
        return LLM(model, nvme_dir=tmp_path / "nvme", launcher=launcher, **given)

    return starts


def ask(llm: LLM, tenant: str = "") -> tuple[list[list[int]], list[int]]:
    """The answers, and how many tokens of each prompt were found in the cache."""
    outputs = llm.generate(PROMPTS, GREEDY, tenant=tenant)
    usages = [output.usage for output in outputs]
    return [o.token_ids for o in outputs], [u.cached_tokens if u else -1 for u in usages]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_later_engine_finds_them(
    tp: int, pp: int, start: Callable[..., LLM], pristine: Path, tmp_path: Path
) -> None:
    expected = reference(pristine, PROMPTS, NUM_TOKENS)
    split = {"tensor_parallel": tp, "pipeline_parallel": pp}
    with start(**split) as llm:
        assert ask(llm) == (expected, [0] * len(PROMPTS))
    folder = tmp_path / "nvme" / "kv"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".index", ".kv"] * tp * pp
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    with start(**split) as llm:
        assert ask(llm) == (expected, [NUM_CACHED] * len(PROMPTS))
        assert ask(llm, tenant="another") == (expected, [0] * len(PROMPTS))
        kv = llm.stats()["kv"]
        assert kv["losses"] == 0
        assert kv["prompt_tokens"] == 2 * sum(map(len, PROMPTS))
        assert kv["prompt_tokens_cached"] == NUM_CACHED * len(PROMPTS)
    with start(**split) as llm:  # what came up and what was new then
        assert ask(llm, tenant="another") == (expected, [NUM_CACHED] * len(PROMPTS))
        assert ask(llm) == (expected, [NUM_CACHED] * len(PROMPTS))
    assert sorted(folder.iterdir()) == files


def test_other_weights_find_nothing(
    start: Callable[..., LLM], pristine: Path, tmp_path: Path
) -> None:
    with start() as llm:
        ask(llm)
    other = save_model("llama", tmp_path, seed=7)
    with start(other) as llm:
        assert ask(llm) == (reference(other, PROMPTS, NUM_TOKENS), [0] * len(PROMPTS))


def test_a_flipped_bit_is_a_miss(start: Callable[..., LLM], pristine: Path, tmp_path: Path) -> None:
    with start() as llm:
        ask(llm)
    (file,) = (tmp_path / "nvme" / "kv").glob("*.kv")
    with file.open("r+b") as stream:
        for offset in range(0, file.stat().st_size, 4096):
            page = bytearray(os.pread(stream.fileno(), 4096, offset))
            if any(page):
                page[offset // 4096 % 64] ^= 2
                os.pwrite(stream.fileno(), page, offset)
    expected = reference(pristine, PROMPTS, NUM_TOKENS)
    with start() as llm:
        assert ask(llm)[0] == expected
        assert llm.stats()["kv"]["losses"] > 0
        assert ask(llm) == (expected, [NUM_CACHED] * len(PROMPTS))


@pytest.mark.parametrize("damage", ["cut", "zeros", "swapped", "gone"])
def test_a_wrong_index_is_a_miss(
    damage: str, start: Callable[..., LLM], pristine: Path, tmp_path: Path
) -> None:
    with start() as llm:
        ask(llm)
    (index,) = (tmp_path / "nvme" / "kv").glob("*.index")
    content = index.read_bytes()
    size = len(content)
    damaged = {
        "cut": content[: size // 2],
        "zeros": content[: size - 64] + bytes(64),
        "swapped": content[: size // 2] + content[size // 2 :][::-1],
        "gone": b"",
    }
    index.write_bytes(damaged[damage])
    with start() as llm:
        assert ask(llm)[0] == reference(pristine, PROMPTS, NUM_TOKENS)


def test_killed_after_it_overwrote_them(
    start: Callable[..., LLM], pristine: Path, tmp_path: Path
) -> None:
    """The index then is older than the file."""
    few = {"prefix_memory": "256KiB", "device_memory": "32MiB"}
    expected = reference(pristine, PROMPTS, NUM_TOKENS)
    with start(**few) as llm:
        ask(llm)
    (file,) = (tmp_path / "nvme" / "kv").glob("*.kv")
    before = file.read_bytes()
    llm = start(**few)
    try:
        (pid,) = llm._engine._executor.worker_pids  # type: ignore[attr-defined]
        for first in range(0, len(OTHERS), 4):
            llm.generate(OTHERS[first : first + 4], GREEDY)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            llm.generate(PROMPTS, GREEDY)
    finally:
        llm.close()
    assert file.read_bytes() != before, "nothing was overwritten: this proves nothing"
    with start(**few) as llm:
        answers, cached = ask(llm)
        assert answers == expected
        assert max(cached) <= NUM_CACHED


def test_two_at_once_both_answer_and_one_keeps(
    start: Callable[..., LLM], pristine: Path, tmp_path: Path
) -> None:
    expected = reference(pristine, PROMPTS, NUM_TOKENS)
    with start() as first, start() as second:
        assert ask(first)[0] == ask(second)[0] == expected
    assert len(list((tmp_path / "nvme" / "kv").iterdir())) == 2
    with start() as llm:
        assert ask(llm) == (expected, [NUM_CACHED] * len(PROMPTS))


def test_more_than_the_disk_may_hold_is_refused(start: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match=r"prefix_memory is 2 MiB, .* lower prefix_memory"):
        start(prefix_memory="2MiB", nvme_memory="1MiB")


@pytest.mark.parametrize("options", [{"prefix_memory": 4096}, {"enable_prefix_caching": False}])
def test_a_memory_that_would_keep_nothing_is_refused(
    options: dict[str, Any], start: Callable[..., LLM]
) -> None:
    with pytest.raises(ConfigError, match="no block of KV can be kept"):
        start(**options)


def test_no_flipped_bit_of_an_index_stops_a_start(tmp_path: Path) -> None:
    path = tmp_path / "kept.index"
    sums = torch.arange(12).view(3, 4)
    KeptIndex({1: bytes(32), 3: bytes([7] * 32)}, sums).write(path, "layout")
    whole = path.read_bytes()
    assert set(KeptIndex.read(path, "layout", 3, 4).hashes) == {1, 3}
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert set(KeptIndex.read(path, "layout", 3, 4).hashes) <= {0, 1, 2, 3}
