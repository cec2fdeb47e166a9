"""What the blocks of a micro-batch move, the same at every layer: worked out once a pass."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from kvcache.micro_batch import MicroBatch
from kvcache.storage.posix import Part
from kvcache.tier import Tier

Index = tuple[torch.Tensor, torch.Tensor]
"""Two of one length, which together select."""

Transfer = tuple[slice, ...]
"""Runs of slots whose blocks are neighbours on NVMe. The runs of a read are near each other."""

RUNS_OF_A_WRITE = 32


class TransferLimits(NamedTuple):
    """In blocks: how many a read or a write may span, and how many a read takes along between two
    runs."""

    span: int
    gap: int


class TokenMoves(NamedTuple):
    """Tokens by (slots, places in the block), as indices on the device, and by (rows, places in
    the block), as indices where the rows lie."""

    slots: Index
    rows: Index


@dataclass(frozen=True, slots=True, eq=False)
class Scatter:
    """What goes home to ``tier``, which is in memory: by token, or by piece, (slots, rows)."""

    tier: Tier
    tokens: TokenMoves
    pieces: Index


@dataclass(frozen=True, slots=True, eq=False)
class KVMoves:
    """``gathers`` are (source, slots, its rows) of what lies in memory, DEVICE or HOST;
    ``scatters`` go there; ``reads`` and ``writes`` are from and to NVMe. ``tails`` are (slots, tail
    rows) before the pass, ``kept`` the tokens that go to tail rows with it; ``filled`` blocks leave
    their tail rows.

    The slots ``on_nvme`` have ``places`` of the file, from which come those that are ``wanted``:
    the others come from tail rows. The slots ``beyond`` are those that do not come from the device.
    """

    micro_batch: MicroBatch
    gathers: tuple[tuple[Tier, slice, torch.Tensor], ...]
    on_nvme: slice
    places: torch.Tensor
    wanted: torch.Tensor
    tails: Index
    reads: tuple[Transfer, ...]
    scatters: tuple[Scatter, ...]
    kept: TokenMoves
    writes: tuple[Transfer, ...]
    beyond: slice
    filled: tuple[int, ...]
    parts: dict[tuple[int, int, int], list[Part]] = field(default_factory=dict)
    """Of a read, the same at many layers: by its first slot, landing and stride."""


def moves_of(
    micro_batch: MicroBatch,
    first_host: int,
    first_nvme: int,
    tails: Mapping[int, int],
    kept: Mapping[int, int],
    block_size: int,
    device: torch.device,
    limits: TransferLimits,
) -> KVMoves:
    """The moves of ``micro_batch``, whose blocks lie on ``device`` before ``first_host``, on the
    host before ``first_nvme``, and from there on NVMe; but the slots ``tails`` come from these tail
    rows, and ``kept`` go to these. What a read takes along is within ``limits`` and in all no more
    than it is for; a write is of at most ``limits.span`` blocks."""
    blocks, loaded = micro_batch.blocks, micro_batch.num_loaded
    host = bisect_left(blocks, first_host, 0, loaded)
    nvme = bisect_left(blocks, first_nvme, host, loaded)
    in_memory = (
        (Tier.DEVICE, range(first_host), slice(0, host), device),
        (Tier.HOST, range(first_host, first_nvme), slice(host, nvme), torch.device("cpu")),
    )
    written = micro_batch.written
    gathers, scatters = [], []
    for tier, region, come, home in in_memory:
        if come.start < come.stop:
            rows = torch.tensor(blocks[come]) - region.start
            gathers.append((tier, come, rows.to(home)))
        go = {slot: blocks[slot] - region.start for slot in written if blocks[slot] in region}
        if go:
            slots, rows = _index(list(go), go)
            tokens = _tokens([(slot, row, written[slot]) for slot, row in go.items()], device, home)
            scatters.append(Scatter(tier, tokens, (slots.to(device), rows.to(home))))
    on_nvme = range(nvme, loaded)
    near = sorted(slot for slot in tails if slot in on_nvme)
    wanted = [slot for slot in on_nvme if slot not in tails]
    behind = [slot for slot in written if blocks[slot] >= first_nvme]
    to_nvme = [slot for slot in behind if slot not in kept]
    # a block that comes to a tail row comes whole
    to_tails = [
        (slot, kept[slot], written[slot] if slot in tails else range(block_size))
        for slot in sorted(kept)
    ]
    return KVMoves(
        micro_batch=micro_batch,
        gathers=tuple(gathers),
        on_nvme=slice(nvme, loaded),
        places=torch.tensor(blocks[nvme:loaded], dtype=torch.long) - first_nvme,
        wanted=torch.tensor([slot not in tails for slot in on_nvme], dtype=torch.bool),
        tails=_index(near, tails),
        reads=tuple(_reads(blocks, _runs(blocks, wanted, limits.span), limits)),
        scatters=tuple(scatters),
        kept=_tokens(to_tails, device, torch.device("cpu")),
        writes=tuple(_writes(_runs(blocks, to_nvme, limits.span), limits.span)),
        beyond=slice(host, loaded),
        filled=tuple(blocks[slot] for slot in behind if slot in tails and slot not in kept),
    )


def slots_of(run: slice) -> range:
    """The slots of a run."""
    return range(run.start, run.stop)


def _tokens(
    moves: Sequence[tuple[int, int, range]], device: torch.device, home: torch.device
) -> TokenMoves:
    """Of the places in (slots, rows, places)."""
    columns = [(slot, row, place) for slot, row, places in moves for place in places]
    slots, rows, places = torch.tensor(columns, dtype=torch.long).view(-1, 3).T.contiguous()
    return TokenMoves((slots.to(device), places.to(device)), (rows.to(home), places.to(home)))


def _index(slots: Sequence[int], rows: Mapping[int, int]) -> Index:
    found = [rows[slot] for slot in slots]
    return torch.tensor(slots, dtype=torch.long), torch.tensor(found, dtype=torch.long)


def _runs(blocks: Sequence[int], slots: Sequence[int], most: int) -> Iterator[slice]:
    """Runs of up to ``most`` neighbouring slots with neighbouring blocks."""
    start = 0
    for index in range(1, len(slots) + 1):
        if index < len(slots) and index - start < most:
            here, before = slots[index], slots[index - 1]
            if here == before + 1 and blocks[here] == blocks[before] + 1:
                continue
        yield slice(slots[start], slots[index - 1] + 1)
        start = index


def _reads(
    blocks: Sequence[int], runs: Iterable[slice], limits: TransferLimits
) -> Iterator[Transfer]:
    """Runs with small gaps between them, together."""
    near: list[slice] = []
    wanted = 0
    for run in runs:
        wanted += len(slots_of(run))
        if near:
            span = blocks[run.stop - 1] + 1 - blocks[near[0].start]
            between = blocks[run.start] - blocks[near[-1].stop - 1] - 1
            if between > limits.gap or span > min(limits.span, 2 * wanted):
                yield tuple(near)
                near, wanted = [], len(slots_of(run))
        near.append(run)
    if near:
        yield tuple(near)


def _writes(runs: Iterable[slice], most: int) -> Iterator[Transfer]:
    """Runs of up to ``most`` slots, together, but not too many for one thread."""
    some: list[slice] = []
    count = 0
    for run in runs:
        count += len(slots_of(run))
        if count > most or len(some) == RUNS_OF_A_WRITE:
            yield tuple(some)
            some, count = [], len(slots_of(run))
        some.append(run)
    if some:
        yield tuple(some)
