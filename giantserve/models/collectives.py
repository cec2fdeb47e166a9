"""The collectives of one shard: within its tensor-parallel group and to its neighbour stages.

Groups are handed in, never taken from process-wide state, so the two kinds of parallelism compose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from giantserve.models.shared_memory import SharedMemoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """A shard's place in the group that splits its layers.

    ``group`` is None for a group of one. ``shared`` takes its place for ranks that share a
    machine's memory.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    shared: SharedMemoryGroup | None = None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place where the tensor allows it. Blocks until the sum is
        there."""
        if self.shared is not None:
            return self.shared.all_reduce(tensor)
        if self.group is None:
            return tensor
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Concatenate the ranks' last dimensions, of the given sizes."""
        if self.shared is not None:
            return self.shared.all_gather(tensor, sizes)
        if self.group is None:
            return tensor
        parts = [tensor.new_empty(*tensor.shape[:-1], max(sizes)) for _ in sizes]
        padded = tensor.new_zeros(*tensor.shape[:-1], max(sizes))
        padded[..., : tensor.shape[-1]] = tensor
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(
            [part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1
        )


class StageLink:
    """Sends hidden states to the next stage and receives them from the previous one.

    Sends do not block: the tensor of the last one is kept until it has left.
    """

    def __init__(self, previous: int | None, following: int | None) -> None:
        self._previous = previous
        self._following = following
        self._sending: tuple[dist.Work, torch.Tensor] | None = None

    def send(self, hidden_TH: torch.Tensor) -> None:
        """Hand the states on; waits only for the send before this one."""
        assert self._following is not None
        if self._sending is not None:
            self._sending[0].wait()
        hidden = hidden_TH.contiguous()
        work = dist.isend(hidden, self._following)
        assert work is not None
        self._sending = (work, hidden)

    def receive(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Fill ``hidden_TH`` with the previous stage's states; blocks until they are there."""
        assert self._previous is not None
        dist.recv(hidden_TH, self._previous)
        return hidden_TH
