"""Pieces of KV between their file on NVMe and the landings of a rotation, with checksums."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial

import torch

from kvcache.checksum import checksums
from kvcache.kept_index import KeptIndex
from kvcache.kv_file import KVFile
from kvcache.kv_moves import KVMoves, Transfer, TransferLimits, slots_of
from kvcache.micro_batch import CHUNK_BYTES, GAP_BYTES
from kvcache.storage.posix import MAX_PARTS, Part
from kvcache.tier import Tier
from kvcache.transfer_stats import Link, TransferStats

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class PieceTransfers:
    """What one micro-batch moves at one layer, and through which landing; with what is under
    way."""

    layer: int
    moves: KVMoves
    landing: int
    reads: list[tuple[Transfer, Future[None]]] = field(default_factory=list)
    writes: list[tuple[Transfer, Future[None]]] = field(default_factory=list)


class NVMePieces:
    """Owns the file, and the checksum of each piece in it.

    Each piece that is written is remembered by its checksum; one that comes back another, or not at
    all, is told as lost, by the slot that it should have come to.
    """

    def __init__(
        self,
        file: KVFile,
        first_block: int,
        strides: Sequence[int],
        landings: Sequence[torch.Tensor],
        transfers: TransferStats,
    ) -> None:
        """``first_block`` is that of the moves which lies first in the file. A slot takes
        ``strides`` bytes of a landing, by layer."""
        self._file = file
        self._first_block = first_block
        self._strides = strides
        self._landings = [landing.numpy().data for landing in landings]
        self._transfers = transfers
        index = file.kept()
        self._sums = index.sums
        self.kept: dict[int, bytes] = {
            first_block + place: found for place, found in index.hashes.items()
        }
        """The content of blocks that an earlier process kept, oldest use first."""
        self.limits = TransferLimits(
            span=min(max(1, CHUNK_BYTES // max(strides)), MAX_PARTS),
            gap=GAP_BYTES // max(strides),
        )

    def start_reads(self, job: PieceTransfers) -> None:
        for runs in job.moves.reads:
            key = runs[0].start, job.landing, self._strides[job.layer]
            parts = job.moves.parts.get(key)
            if parts is None:
                parts = job.moves.parts[key] = self._parts(job, runs)
            job.reads.append((runs, self._read(job, runs, parts)))

    def finish_reads(self, job: PieceTransfers, rows: torch.Tensor) -> set[int]:
        """Wait for them. Returns the slots of ``rows``, the landing as [num_slots, stride], whose
        pieces are lost."""
        begun_s = time.perf_counter()
        if not all(future.done() for _, future in job.reads):
            wait([future for _, future in job.reads])
            self._transfers.add_stall(begun_s, f"KV of layer {job.layer}")
        moves = job.moves
        with_gaps = [future for runs, future in job.reads if len(runs) > 1]
        lost = _still_failing(job.reads, partial(self._read_again, job))
        error = next((e for future in with_gaps if (e := future.exception()) is not None), None)
        if error is not None and not lost:
            logger.warning("reads no longer take along what lies between blocks: %s", error)
            self.limits = self.limits._replace(gap=0)
        found = checksums(rows[moves.on_nvme])
        wrong = moves.wanted & (found != self._sums[job.layer][moves.places])
        if wrong.any():
            logger.warning("KV is lost: %d blocks fail their checksum", int(wrong.sum()))
            first: int = moves.on_nvme.start
            lost.update((wrong.nonzero().flatten() + first).tolist())
        return lost

    def start_writes(self, job: PieceTransfers, rows: torch.Tensor) -> None:
        """Write what lies in the landing, of which ``rows`` is the view as above, and which is not
        to change meanwhile."""
        for run in (run for runs in job.moves.writes for run in runs):
            sums = checksums(rows[run])
            place = self._place(job, run.start)
            self._sums[job.layer, place : place + sums.shape[0]] = sums
        job.writes.extend((runs, self._write(job, runs)) for runs in job.moves.writes)

    def finish_writes(self, job: PieceTransfers) -> set[int]:
        """Wait for them. Returns the slots whose pieces are lost."""
        return _still_failing(job.writes, partial(self._write, job))

    def keep(self, hashes: Mapping[int, bytes]) -> None:
        """Leave the content of these blocks, oldest use first, to a later process, if the disk lets
        it."""
        places = {block - self._first_block: found for block, found in hashes.items()}
        try:
            self._file.keep(KeptIndex(places, self._sums))
        except OSError as error:
            logger.warning("cached prefixes are not kept: %s", error)

    @property
    def num_bytes(self) -> int:
        """What the file takes of the disk."""
        return self._file.num_bytes

    def close(self) -> None:
        """Give the disk space back, unless it is kept. Idempotent."""
        self._file.close()

    def _parts(self, job: PieceTransfers, runs: Transfer) -> list[Part]:
        """Where a read of ``runs`` goes, and how much lies between them."""
        stride, blocks = self._strides[job.layer], job.moves.micro_batch.blocks
        landing = self._landings[job.landing]
        parts: list[Part] = []
        end = blocks[runs[0].start]
        for run in runs:
            if gap := blocks[run.start] - end:
                parts.append(gap * stride)
            parts.append(landing[run.start * stride : run.stop * stride])
            end = blocks[run.stop - 1] + 1
        return parts

    def _read(self, job: PieceTransfers, runs: Transfer, parts: Sequence[Part]) -> Future[None]:
        first, last = self._place(job, runs[0].start), self._place(job, runs[-1].stop - 1)
        num_bytes = (last + 1 - first) * self._strides[job.layer]
        link = Link("kv", Tier.NVME, Tier.DEVICE)
        begun_s = self._transfers.begin(link)
        future = self._file.submit_read(job.layer, first, parts)
        future.add_done_callback(partial(self._count, link, num_bytes, begun_s, job.layer))
        return future

    def _read_again(self, job: PieceTransfers, runs: Transfer) -> Future[None]:
        return self._read(job, runs, self._parts(job, runs))

    def _write(self, job: PieceTransfers, runs: Transfer) -> Future[None]:
        landing, stride = self._landings[job.landing], self._strides[job.layer]
        pieces = [
            (self._place(job, run.start), landing[run.start * stride : run.stop * stride])
            for run in runs
        ]
        num_bytes = sum(len(memory) for _, memory in pieces)
        link = Link("kv", Tier.DEVICE, Tier.NVME)
        begun_s = self._transfers.begin(link)
        future = self._file.submit_write(job.layer, pieces)
        future.add_done_callback(partial(self._count, link, num_bytes, begun_s, job.layer))
        return future

    def _place(self, job: PieceTransfers, slot: int) -> int:
        """Where in the file the slot's block lies."""
        return job.moves.micro_batch.blocks[slot] - self._first_block

    def _count(
        self, link: Link, num_bytes: int, begun_s: float, layer: int, done: Future[None]
    ) -> None:
        moved = 0 if done.exception() else num_bytes
        self._transfers.end(link, moved, begun_s, f"layer {layer}")


def _still_failing(
    transfers: list[tuple[Transfer, Future[None]]], again: Callable[[Transfer], Future[None]]
) -> set[int]:
    """Of the transfers that failed, those slots that fail by themselves, too: a bad page costs one
    block. Waits, and forgets the transfers."""
    failed = [runs for runs, future in transfers if future.exception() is not None]
    transfers.clear()
    slots = [slot for runs in failed for run in runs for slot in slots_of(run)]
    alone = [(slot, again((slice(slot, slot + 1),))) for slot in slots]
    errors = {slot: e for slot, future in alone if (e := future.exception()) is not None}
    if errors:
        error = next(iter(errors.values()))
        logger.warning("KV is lost: %d blocks cannot be moved: %s", len(errors), error)
    return set(errors)
