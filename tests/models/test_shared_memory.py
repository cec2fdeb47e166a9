"""Collectives over shared memory against the same sums and concatenations done in one process."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from giantserve.models.shared_memory import SLOT_BYTES, SharedMemoryGroup

SHAPES = ((1, 3), (7, 64), (3, SLOT_BYTES // 4 + 5))
"""The last one takes several exchanges."""

ROWS = (4, 0, 1)
"""A pass in the middle of a prompt has no rows of logits."""


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator).to(dtype)


def run_rank(rank: int, world: int, port: int, answer: Connection[Any, Any]) -> None:
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    shared = SharedMemoryGroup.join(rank, group, list(range(world)))
    assert shared is not None
    results = []
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                results.append(shared.all_reduce(part(rank, shape, dtype)))
        sizes = [5 + r for r in range(world)]
        for rows in ROWS:
            ours = part(rank, (rows, sizes[rank]), torch.float32)
            results.append(shared.all_gather(ours, sizes))
    answer.send([tensor.float().numpy() for tensor in results])
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_sums_and_concatenates_like_one_process(world: int) -> None:
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=run_rank, args=(rank, world, store.port, ends[rank][1]))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    answers = [[torch.from_numpy(a) for a in receive.recv()] for receive, _ in ends]
    for process in ranks:
        process.join()
    expected = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            parts = [part(rank, shape, dtype).float() for rank in range(world)]
            expected.append(sum(parts[1:], parts[0]).to(dtype).float())
    for rows in ROWS:
        gathered = [part(rank, (rows, 5 + rank), torch.float32) for rank in range(world)]
        expected.append(torch.cat(gathered, dim=-1))
    for answer in answers:
        assert len(answer) == 3 * len(expected)
        for got, same, want in zip(answer, answers[0], expected * 3, strict=True):
            assert torch.equal(got, same), "ranks differ"
            assert torch.allclose(got, want, rtol=1e-6 if world == 2 else 1e-2)
