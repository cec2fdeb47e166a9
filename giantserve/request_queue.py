"""Requests kept in the order in which they are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from giantserve.request import Request


class RequestQueue:
    """A sorted set of requests: priority first, then arrival. Their ranks must not change."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __reversed__(self) -> Iterator[Request]:
        return reversed(self._requests)

    @property
    def head(self) -> Request:
        """The request to be served first. Raises IndexError on an empty queue."""
        return self._requests[0]

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=_rank)

    def remove(self, request: Request) -> None:
        """Take out a request that is in the queue."""
        index = bisect_left(self._requests, request.rank, key=_rank)
        assert self._requests[index] is request, f"sequence {request.seq_id} is not queued"
        del self._requests[index]


def _rank(request: Request) -> tuple[int, float, int]:
    return request.rank
