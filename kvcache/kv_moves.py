"""What the blocks of a micro-batch move, the same at every layer: worked out once a pass."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvcache.micro_batch import MicroBatch
from kvcache.tier import Tier

Index = tuple[torch.Tensor, torch.Tensor]
"""Two of one length, which together select."""


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
    ``scatters`` go there; ``reads`` and ``writes`` are runs of slots whose blocks are neighbours on
    NVMe. ``tails`` are (slots, tail rows) before the pass, ``kept`` the tokens that go to tail
    rows with it; ``filled`` blocks leave their tail rows.

    The slots ``on_nvme`` are read from ``places`` of the file; what comes to those that are not
    ``wanted``, since they lie in tail rows or between others, counts for nothing, and ``blank``
    ones are cleared: they are written to. The slots ``beyond`` are those that do not come from the
    device.
    """

    micro_batch: MicroBatch
    gathers: tuple[tuple[Tier, slice, torch.Tensor], ...]
    on_nvme: slice
    places: torch.Tensor
    wanted: torch.Tensor
    blank: tuple[int, ...]
    tails: Index
    reads: tuple[slice, ...]
    scatters: tuple[Scatter, ...]
    kept: TokenMoves
    writes: tuple[slice, ...]
    beyond: slice
    filled: tuple[int, ...]


def moves_of(
    micro_batch: MicroBatch,
    first_host: int,
    first_nvme: int,
    tails: Mapping[int, int],
    kept: Mapping[int, int],
    block_size: int,
    device: torch.device,
) -> KVMoves:
    """The moves of ``micro_batch``, whose blocks lie on ``device`` before ``first_host``, on the
    host before ``first_nvme``, and from there on NVMe; but the slots ``tails`` come from these tail
    rows, and ``kept`` go to these."""
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
    unwanted = micro_batch.bridges.union(near)
    behind = [slot for slot in written if blocks[slot] >= first_nvme]
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
        wanted=torch.tensor([slot not in unwanted for slot in on_nvme], dtype=torch.bool),
        blank=tuple(micro_batch.bridges.intersection(written)),
        tails=_index(near, tails),
        reads=tuple(r for r in _runs(blocks, on_nvme) if not unwanted.issuperset(slots_of(r))),
        scatters=tuple(scatters),
        kept=_tokens(to_tails, device, torch.device("cpu")),
        writes=tuple(_runs(blocks, [slot for slot in behind if slot not in kept])),
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


def _runs(blocks: Sequence[int], slots: Sequence[int]) -> Iterator[slice]:
    """Maximal runs of neighbouring slots with neighbouring blocks."""
    start = 0
    for index in range(1, len(slots) + 1):
        if index < len(slots):
            here, before = slots[index], slots[index - 1]
            if here == before + 1 and blocks[here] == blocks[before] + 1:
                continue
        yield slice(slots[start], slots[index - 1] + 1)
        start = index
