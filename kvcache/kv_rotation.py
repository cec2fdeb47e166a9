"""KV of running sequences that lies on the host or on NVMe, brought to the device layer by layer.

A pass goes through its layers once. Within each, its micro-batches come to the device one after
the other: while one is attended to, the next ones' pieces are read from NVMe and the last one's are
written back, so that the batch is bounded by host and NVMe memory and each weight still moves once
(the block schedule of FlexGen, Sheng et al., 2023, with the batch within the layer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from kvcache.arena import ALIGNMENT, Arena
from kvcache.block_pool import CachedBlock
from kvcache.kv_codec import codecs
from kvcache.kv_file import KVFile
from kvcache.kv_moves import Index, KVMoves, TokenMoves, TransferLimits, moves_of
from kvcache.kv_store import KVStore, KVViews, layer_views
from kvcache.micro_batch import NUM_BUFFERS, MicroBatch
from kvcache.nvme_pieces import NVMePieces, PieceTransfers
from kvcache.storage.posix import PosixBackend
from kvcache.tail_rows import TailRows
from kvcache.tier import Tier
from kvcache.trace import Trace
from kvcache.transfer_stats import Link, TransferStats


@dataclass(slots=True, eq=False)
class _Job(PieceTransfers):
    """One micro-batch at one layer. ``stored``: what goes home is in the landing already.
    ``brought_up``: on CUDA, the end of the copies from the landing."""

    stored: bool = False
    brought_up: torch.cuda.Event | None = None


class KVRotation:
    """Owns the blocks beyond the device's: from the block ``first_host`` on ``num_host_blocks`` on
    the host, unless they adjoin the device's in its store, from ``first_nvme`` on
    ``num_nvme_blocks`` on NVMe.

    A block of NVMe to which every pass adds a token would be read and written with each, a small
    piece a layer. So until it is full it lies in a *tail* row on the host, where one is left.

    Host and NVMe hold pieces as the layout's storage dtype has them. They reach the device through
    a *landing*: the buffer itself, unless the device cannot be read into or the dtypes differ.

    Used by the thread that computes: `begin`, then for every layer of the store's layout and every
    micro-batch in order `take` and `put_back`, then `end`.
    """

    def __init__(
        self,
        store: KVStore,
        *,
        num_host_blocks: int,
        num_nvme_blocks: int,
        num_slots: int,
        num_tail_blocks: int = 0,
        attends_on_host: bool = False,
        device_arena: Arena,
        host_arena: Arena,
        folder: Path | None,
        kept_as: str | None = None,
        trace: Trace | None = None,
    ) -> None:
        """``num_slots`` pieces fit into each of the `NUM_BUFFERS` buffers on the device.
        ``attends_on_host``: sequences that lie wholly on the host are meant to be used there,
        through `host_views`, or through the store where its blocks adjoin the device's. NVMe blocks
        lie in a file in ``folder``, whose content `keep` leaves to a later process where it is
        ``kept_as`` a name.

        Raises what `KVFile` raises, and TierFullError.
        """
        self._store = store
        layout = store.layout
        self._pieces = [layout.piece(index) for index in range(len(layout.layers))]
        self._places = {spec.layer: index for index, spec in enumerate(layout.layers)}
        self._stored = [layout.stored_piece(index) for index in range(len(layout.layers))]
        self._codecs = codecs(layout)
        self._strides = [_aligned(piece.num_bytes) for piece in self._stored]
        self._buffer_strides = [_aligned(piece.num_bytes) for piece in self._pieces]
        self.first_host: int = store.num_device_blocks
        self.first_nvme: int = self.first_host + num_host_blocks
        self.attends_on_host = attends_on_host
        self.num_blocks = self.first_nvme + num_nvme_blocks
        self.num_slots = num_slots
        if store.num_adjoining_blocks:
            assert store.num_adjoining_blocks == num_host_blocks
            host = store.adjoining_rows
        else:
            host = store.allocate_stored(host_arena, num_host_blocks)
        self._homes = {
            Tier.DEVICE: store.device_rows,
            Tier.HOST: host,
        }
        self._tails = TailRows(store.allocate(host_arena, num_tail_blocks))
        size = num_slots * max(self._buffer_strides)
        self._buffers = [device_arena.allocate(size) for _ in range(NUM_BUFFERS)]
        self._staged = device_arena.device.type != "cpu" or layout.storage_dtype != "auto"
        self._landings = self._buffers
        if self._staged:
            size = num_slots * max(self._strides)
            self._landings = [host_arena.allocate(size) for _ in range(NUM_BUFFERS)]
        self.transfers = TransferStats(trace)
        self._nvme: NVMePieces | None = None
        if num_nvme_blocks:
            assert folder is not None, "NVMe blocks need a folder"
            file = KVFile(folder, self._strides, num_nvme_blocks, PosixBackend(), kept_as)
            self._nvme = NVMePieces(
                file, self.first_nvme, self._strides, self._landings, self.transfers
            )
        self._jobs: list[_Job] = []
        self._at = 0
        self._lost: set[CachedBlock] = set()

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Start a pass: the first reads are on their way when this returns."""
        assert self._at == len(self._jobs), "the last pass has not ended"
        for each in micro_batches:
            for slot, places in each.written.items():
                if places.start == 0:  # a row that it has is of the sequence that had it before
                    self._tails.drop(each.blocks[slot])
        self._make_room(micro_batches)
        order = product(range(len(self._strides)), [self._moves(each) for each in micro_batches])
        self._jobs = [
            _Job(layer, moves, index % NUM_BUFFERS) for index, (layer, moves) in enumerate(order)
        ]
        self._at = 0
        for job in self._jobs[: NUM_BUFFERS - 1]:
            self._start_reads(job)

    def take(self, layer: int) -> KVViews:
        """The next micro-batch's keys and values at ``layer``, a block a slot: [num_slots,
        block_size, heads, dim] each. Waits for reads. Valid, and writable, until `put_back`.

        What cannot be read, or fails its checksum, comes as zeros and counts as lost.
        """
        job = self._jobs[self._at]
        assert job.layer == self._places[layer], f"layer {layer} is not what comes next"
        landing, buffer = self._landing(job), self._buffer(job)
        self._gather(job, landing, buffer)
        if job.reads:
            assert self._nvme is not None
            self._lose(job, self._nvme.finish_reads(job, landing), landing)
        if self._staged:
            self._bring_up(job, landing[job.moves.beyond], buffer[job.moves.beyond])
            if buffer.is_cuda:
                job.brought_up = torch.cuda.current_stream(buffer.device).record_event()
        self._gather_tails(job, buffer)
        micro_batch = job.moves.micro_batch
        # new blocks, or a codec would weigh what was there before
        buffer[micro_batch.num_loaded : len(micro_batch.blocks)].zero_()
        return layer_views(buffer, self._pieces[job.layer], self._store.layout, job.layer, at=0)

    def host_views(self, layer: int) -> KVViews:
        """Keys and values of ``layer`` where they lie on the host, [num_host_blocks, block_size,
        heads, dim] each, for blocks that no micro-batch of the pass has."""
        place = self._places[layer]
        return layer_views(self._homes[Tier.HOST], self._pieces[place], self._store.layout, place)

    def put_back(self) -> None:
        """The attention to what `take` gave is over: what was written goes home."""
        job = self._jobs[self._at]
        self._at += 1
        self._scatter(job)
        if self._at >= 2:
            self._free_landing(self._jobs[self._at - 2])
        following = self._at + NUM_BUFFERS - 2
        if following < len(self._jobs):
            self._start_reads(self._jobs[following])

    def end(self) -> None:
        """The pass is over, or was left in the middle: wait for what is under way."""
        first, self._at = self._at, len(self._jobs)
        for job in self._jobs[max(0, first - 1) : first + NUM_BUFFERS]:
            for _, future in job.reads:
                future.exception()
            self._free_landing(job)
        for block in {block for job in self._jobs for block in job.moves.filled}:
            self._tails.drop(block)

    def take_lost(self) -> tuple[CachedBlock, ...]:
        """The blocks whose content was lost since the last call: rotating ones, and host blocks
        that were to take theirs."""
        lost, self._lost = tuple(self._lost), set()
        return lost

    def tier_of(self, block: int) -> Tier:
        """Where a block that rotates lies."""
        return Tier.HOST if block < self.first_nvme else Tier.NVME

    def save(
        self,
        blocks: Sequence[int],
        rows: Sequence[torch.Tensor],
        targets: Sequence[CachedBlock],
        *,
        stored: bool,
    ) -> None:
        """Copy whole blocks, all distinct, to ``rows`` in memory, which are the contents of
        ``targets``: as they lie below the device (``stored``) or on it."""
        before, self._lost = self._lost, set()
        self._move(blocks, rows, write=False, stored=stored)
        pairs = zip(blocks, targets, strict=True)
        self._lost |= {to for block, to in pairs if CachedBlock(Tier.DEVICE, block) in self._lost}
        self._lost |= before

    def restore(self, rows: Sequence[torch.Tensor], blocks: Sequence[int], *, stored: bool) -> None:
        """Copy ``rows`` in memory, in either form, to whole blocks, all distinct."""
        self._move(blocks, rows, write=True, stored=stored)

    def keep(self, hashes: Mapping[int, bytes]) -> None:
        """Leave the content of these NVMe blocks, oldest use first, to a later process, if the disk
        lets it."""
        if self._nvme is not None:
            self._nvme.keep(hashes)

    @property
    def kept(self) -> dict[int, bytes]:
        """The content of blocks that an earlier process kept, oldest use first."""
        return {} if self._nvme is None else self._nvme.kept

    @property
    def nvme_bytes(self) -> int:
        """What it takes of the disk."""
        return 0 if self._nvme is None else self._nvme.num_bytes

    def close(self) -> None:
        """Give the disk space back, unless it is kept. Idempotent."""
        if self._nvme is not None:
            self._nvme.close()

    def _buffer(self, job: _Job) -> torch.Tensor:
        """The job's pieces on the device, [num_slots, bytes]."""
        return self._rows(self._buffers[job.landing], self._buffer_strides[job.layer])

    def _landing(self, job: _Job) -> torch.Tensor:
        """The same as they lie below the device."""
        return self._rows(self._landings[job.landing], self._strides[job.layer])

    def _rows(self, memory: torch.Tensor, stride: int) -> torch.Tensor:
        return memory[: self.num_slots * stride].view(self.num_slots, stride)

    def _make_room(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Free tail rows for the unfinished blocks of a pass, those used longest ago first."""
        used = {block for each in micro_batches for block in each.blocks}
        coming = [
            each.blocks[slot]
            for each in micro_batches
            for slot in each.unfinished
            if each.blocks[slot] >= self.first_nvme
        ]
        for block in self._tails.in_the_way(coming, used):
            row = self._tails.rows[self._tails[block]]
            self._tails.drop(block)
            self._move([block], [row], write=True, stored=False)

    def _keep_tails(self, micro_batch: MicroBatch) -> set[int]:
        """The slots whose blocks lie in tail rows after the pass."""
        blocks = micro_batch.blocks
        on_nvme = (slot for slot in micro_batch.unfinished if blocks[slot] >= self.first_nvme)
        return {slot for slot in on_nvme if self._tails.keep(blocks[slot])}

    def _moves(self, micro_batch: MicroBatch) -> KVMoves:
        blocks = micro_batch.blocks
        before = {slot: self._tails[b] for slot, b in enumerate(blocks) if b in self._tails}
        after = {slot: self._tails[blocks[slot]] for slot in self._keep_tails(micro_batch)}
        device, size = self._buffers[0].device, self._store.layout.block_size
        limits = TransferLimits(1, 0) if self._nvme is None else self._nvme.limits
        return moves_of(
            micro_batch, self.first_host, self.first_nvme, before, after, size, device, limits
        )

    def _start_reads(self, job: _Job) -> None:
        if job.moves.reads:
            assert self._nvme is not None
            self._nvme.start_reads(job)

    def _gather(self, job: _Job, landing: torch.Tensor, buffer: torch.Tensor) -> None:
        """Bring what lies on the device and on the host into the slots."""
        for tier, slots, rows in job.moves.gathers:
            part = self._part(job, tier)
            target = (buffer if tier is Tier.DEVICE else landing)[slots, : part.stop - part.start]
            link = Link("kv", tier, Tier.DEVICE)
            begun_s = self.transfers.begin(link)
            torch.index_select(_words(self._homes[tier][:, part]), 0, rows, out=_words(target))
            self.transfers.end(link, target.nbytes, begun_s, f"layer {job.layer}")

    def _part(self, job: _Job, tier: Tier) -> slice:
        """Where the job's layer lies in a block of that tier."""
        piece = (self._pieces if tier is Tier.DEVICE else self._stored)[job.layer]
        return slice(piece.offset, piece.offset + piece.num_bytes)

    def _bring_up(self, job: _Job, landed: torch.Tensor, buffer: torch.Tensor) -> None:
        codec = self._codecs[job.layer]
        if codec is None:
            buffer.copy_(landed, non_blocking=True)
        else:
            codec.decode(landed.to(buffer.device, non_blocking=True), buffer)

    def _put_down(self, job: _Job, buffer: torch.Tensor) -> torch.Tensor:
        """Pieces from the device as they lie below it, in host memory."""
        codec, num_bytes = self._codecs[job.layer], self._stored[job.layer].num_bytes
        if codec is None:
            return buffer[:, :num_bytes].cpu()
        stored = buffer.new_empty(buffer.shape[0], num_bytes)
        codec.encode(buffer, stored)
        return stored.cpu()

    def _gather_tails(self, job: _Job, buffer: torch.Tensor) -> None:
        slots, rows = job.moves.tails
        if not rows.shape[0]:
            return
        link = Link("kv", Tier.HOST, Tier.DEVICE)
        begun_s = self.transfers.begin(link)
        part = self._part(job, Tier.DEVICE)
        found = _words(self._tails.rows[:, part]).index_select(0, rows).to(buffer.device)
        _words(buffer[:, : part.stop - part.start]).index_copy_(0, slots.to(buffer.device), found)
        self.transfers.end(link, found.nbytes, begun_s, f"layer {job.layer}")

    def _scatter_tokens(self, job: _Job, tokens: TokenMoves, home: torch.Tensor) -> int:
        """Bring tokens to the blocks ``home`` [N, block_bytes], which are as on the device. Returns
        the bytes."""
        piece, layout = self._pieces[job.layer], self._store.layout
        sources = layer_views(self._buffer(job), piece, layout, job.layer, at=0)
        targets = layer_views(home, piece, layout, job.layer)
        moved = 0
        for source, target in zip(sources, targets, strict=True):
            found = source[tokens.slots].to(home.device)
            target.index_put_(tokens.rows, found)
            moved += found.nbytes
        return moved

    def _scatter_pieces(self, job: _Job, pieces: Index, home: torch.Tensor) -> int:
        """Bring pieces to the host's blocks ``home``, which are in the storage dtype. Returns the
        bytes."""
        slots, rows = pieces
        part = self._part(job, Tier.HOST)
        if job.stored:
            found = self._landing(job)[slots.cpu(), : part.stop - part.start]
        else:
            found = self._put_down(job, self._buffer(job)[slots])
        _words(home[:, part]).index_copy_(0, rows, _words(found))
        return found.nbytes

    def _lose(self, job: _Job, slots: Iterable[int], landing: torch.Tensor | None = None) -> None:
        """The blocks at ``slots`` have lost their content."""
        for slot in slots:
            self._lost.add(CachedBlock(Tier.DEVICE, job.moves.micro_batch.blocks[slot]))
            if landing is not None:
                landing[slot] = 0

    def _scatter(self, job: _Job) -> None:
        """Bring the written slots home; to NVMe behind the computation."""
        buffer, landing = self._buffer(job), self._landing(job)
        as_stored = job.stored or self._codecs[job.layer] is not None
        for scatter in job.moves.scatters:
            link = Link("kv", Tier.DEVICE, scatter.tier)
            begun_s = self.transfers.begin(link)
            home = self._homes[scatter.tier]
            if scatter.tier is Tier.HOST and as_stored:
                moved = self._scatter_pieces(job, scatter.pieces, home)
            else:
                moved = self._scatter_tokens(job, scatter.tokens, home)
            self.transfers.end(link, moved, begun_s, f"layer {job.layer}")
        if job.moves.kept.rows[0].shape[0]:
            link = Link("kv", Tier.DEVICE, Tier.HOST)
            begun_s = self.transfers.begin(link)
            moved = self._scatter_tokens(job, job.moves.kept, self._tails.rows)
            self.transfers.end(link, moved, begun_s, f"layer {job.layer}")
        if job.moves.writes:
            assert self._nvme is not None
            if self._staged and not job.stored:
                for run in (run for runs in job.moves.writes for run in runs):
                    down = self._put_down(job, buffer[run])
                    landing[run, : down.shape[1]] = down
            self._nvme.start_writes(job, landing)

    def _free_landing(self, job: _Job) -> None:
        """Wait until what was brought up and what was written no longer needs the job's landing."""
        if job.brought_up is not None:
            job.brought_up.synchronize()
        if job.writes:
            assert self._nvme is not None
            self._lose(job, self._nvme.finish_writes(job))

    def _move(
        self, blocks: Sequence[int], rows: Sequence[torch.Tensor], *, write: bool, stored: bool
    ) -> None:
        """Copy whole blocks from or to rows in memory, as passes of their own."""
        order = sorted(zip(blocks, rows, strict=True), key=lambda pair: pair[0])
        whole_block = range(self._store.layout.block_size)
        for start in range(0, len(order), self.num_slots):
            chosen, memory = zip(*order[start : start + self.num_slots], strict=True)
            whole = MicroBatch(
                members=(),
                blocks=chosen,
                num_loaded=0 if write else len(chosen),
                written=dict.fromkeys(range(len(chosen)), whole_block) if write else {},
            )
            self.begin([whole])
            for spec in self._store.layout.layers:
                self.take(spec.layer)
                job = self._jobs[self._at]
                job.stored = stored and write
                part = self._part(job, Tier.HOST if stored else Tier.DEVICE)
                pieces = self._landing(job) if stored else self._buffer(job)
                slots, tails = job.moves.tails
                if stored and tails.shape[0]:
                    own = self._put_down(job, self._buffer(job)[slots.to(self._buffers[0].device)])
                    pieces[slots, : own.shape[1]] = own
                for slot, row in zip(pieces[:, : part.stop - part.start], memory, strict=False):
                    (slot if write else row[part]).copy_(row[part] if write else slot)
                self.put_back()
            self.end()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The rows as the widest words that divide them: they copy faster than bytes."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        width = dtype.itemsize
        aligned = rows.storage_offset() % width == 0 and rows.stride(0) % width == 0
        if aligned and rows.shape[1] % width == 0:
            return rows.view(dtype)
    return rows
