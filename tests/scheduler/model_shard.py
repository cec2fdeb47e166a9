"""A shard that computes on tokens instead of tensors: it knows what every KV slot ought to hold."""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence

from giantserve.request import Request
from giantserve.step import NewSequence, SequenceChunk, StepPlan
from kvcache.block_pool import CachedBlock
from kvcache.tier import Tier

VOCAB = 8
NONSENSE = "nonsense"


def next_token(tenant: str, context: Sequence[int], banned: Sequence[int]) -> int:
    """What the model says after ``context``: depends on all of it, and on nothing else."""
    drawn = zlib.crc32(repr((tenant, tuple(context))).encode()) % VOCAB
    return next(t % VOCAB for t in range(drawn, drawn + VOCAB) if t % VOCAB not in banned)


class _Sequence:
    def __init__(self, new: NewSequence) -> None:
        self.new = new
        self.block_ids = list(new.block_ids)
        self.output = list(new.output_token_ids)
        self.is_nonsense = False

    @property
    def tokens(self) -> list[int]:
        return [*self.new.prompt_token_ids, *self.output]


class ModelShard:
    """Runs plans in FIFO order and asserts that each chunk finds exactly its own context.

    The KV of position p is modelled as (tenant, tokens 0..p): what a real key depends on. A
    chunk's context from earlier passes and slices is checked before its slice writes anything (so
    no chunk may lean on a block that another chunk of the same slice fills, and none that rotates
    on one of the same pass), and all contexts again after all have written (so no two chunks write
    to the same place).

    `damage` makes a block unreadable: passes that need it report it, and what they compute from it,
    or from what was computed from it, is `NONSENSE`.
    """

    def __init__(
        self,
        num_device: int,
        num_host: int,
        block_size: int,
        request_of: Callable[[int], Request],
        *,
        max_slice_tokens: int,
        first_rotating: int,
    ) -> None:
        self.max_slice_tokens = max_slice_tokens
        self.first_rotating = first_rotating
        self.block_size = block_size
        self.request_of = request_of
        self.memory: dict[Tier, list[dict[int, object]]] = {
            Tier.DEVICE: [{} for _ in range(num_device)],
            Tier.HOST: [{} for _ in range(num_host)],
        }
        self.sequences: dict[int, _Sequence] = {}
        self.queue: deque[StepPlan] = deque()
        self.copied: Counter[CachedBlock] = Counter()
        self.damaged: set[int] = set()
        self.lost: set[CachedBlock] = set()

    def submit(self, plan: StepPlan) -> None:
        self.queue.append(plan)

    def damage(self, block_id: int) -> None:
        """Whoever reads this device block from now on finds it lost, until it is written anew."""
        self.damaged.add(block_id)

    def run_next(self) -> tuple[int, dict[int, int], set[CachedBlock]]:
        """Execute the oldest plan: its id, the token of each sampling chunk, and lost blocks."""
        self.lost = set()
        plan = self.queue.popleft()
        for seq_id in plan.finished:
            del self.sequences[seq_id]
        for new in plan.new:
            assert new.prompt_token_ids == self.request_of(new.seq_id).prompt_token_ids
            old = self.sequences.get(new.seq_id)
            if not self.request_of(new.seq_id).num_losses:  # whose last tokens do not count
                assert new.output_token_ids == (tuple(old.output) if old else ())
            self.sequences[new.seq_id] = _Sequence(new)
        for copy in plan.copies:
            content = self.memory[copy.source][copy.source_id]
            assert content, "a block is copied that was never written"
            source = CachedBlock(copy.source, copy.source_id)
            target = CachedBlock(copy.target, copy.target_id)
            if copy.target is Tier.DEVICE:
                self.damaged.discard(copy.target_id)
            self.memory[copy.target][copy.target_id] = dict(content)
            if copy.source is Tier.DEVICE and copy.source_id in self.damaged:
                self.lost |= {source, target}
                self.memory[copy.target][copy.target_id] = dict.fromkeys(content, NONSENSE)
            self.copied[target] += 1
        for seq_id, number in Counter(chunk.seq_id for chunk in plan.chunks).items():
            rotates = max(self.sequences[seq_id].block_ids) >= self.first_rotating
            assert number == 1 or not rotates
        for chunks in self._slices(plan):
            for chunk in chunks:
                sequence = self.sequences[chunk.seq_id]
                sequence.block_ids.extend(chunk.new_block_ids)
                assert len(set(sequence.block_ids)) == len(sequence.block_ids)
                self._check_context(chunk, chunk.start)
            for chunk in chunks:
                self._write(chunk)
        for chunk in plan.chunks:
            self._check_context(chunk, chunk.start + len(chunk.token_ids))
        tokens = {c.seq_id: self._sample(c) for c in plan.chunks if c.sample}
        return plan.step_id, tokens, self.lost

    def _slices(self, plan: StepPlan) -> list[list[SequenceChunk]]:
        """Whole chunks, as many together as a slice has room for."""
        slices: list[list[SequenceChunk]] = []
        room = 0
        for chunk in plan.chunks:
            assert len(chunk.token_ids) <= self.max_slice_tokens
            if len(chunk.token_ids) > room:
                slices.append([])
                room = self.max_slice_tokens
            slices[-1].append(chunk)
            room -= len(chunk.token_ids)
        return slices

    def _value(self, seq_id: int, position: int) -> object:
        tokens = self.sequences[seq_id].tokens
        return self.request_of(seq_id).tenant, tuple(tokens[: position + 1])

    def _slot(self, seq_id: int, position: int) -> tuple[dict[int, object], int]:
        block_id = self.sequences[seq_id].block_ids[position // self.block_size]
        return self.memory[Tier.DEVICE][block_id], position % self.block_size

    def _check_context(self, chunk: SequenceChunk, stop: int) -> None:
        sequence = self.sequences[chunk.seq_id]
        for position in range(stop):
            block, offset = self._slot(chunk.seq_id, position)
            block_id = sequence.block_ids[position // self.block_size]
            if block_id in self.damaged:
                self.lost.add(CachedBlock(Tier.DEVICE, block_id))
                sequence.is_nonsense = True
            if block.get(offset) == NONSENSE:
                sequence.is_nonsense = True
            if sequence.is_nonsense:
                continue
            expected = self._value(chunk.seq_id, position)
            assert block.get(offset) == expected, (
                f"sequence {chunk.seq_id}, position {position}: {block.get(offset)} for {expected}"
            )

    def _write(self, chunk: SequenceChunk) -> None:
        tokens = self.sequences[chunk.seq_id].tokens
        stop = chunk.start + len(chunk.token_ids)
        assert chunk.token_ids and chunk.token_ids == tuple(tokens[chunk.start : stop])
        assert chunk.sample == (stop == len(tokens))
        for position in range(chunk.start, stop):
            block, offset = self._slot(chunk.seq_id, position)
            if offset == 0:
                block.clear()
                table = self.sequences[chunk.seq_id].block_ids
                self.damaged.discard(table[position // self.block_size])
            nonsense = self.sequences[chunk.seq_id].is_nonsense
            block[offset] = NONSENSE if nonsense else self._value(chunk.seq_id, position)

    def _sample(self, chunk: SequenceChunk) -> int:
        sequence, request = self.sequences[chunk.seq_id], self.request_of(chunk.seq_id)
        barred = len(sequence.output) < request.sampling.min_tokens
        assert chunk.banned_token_ids == (request.end_token_ids if barred else ())
        token = next_token(request.tenant, sequence.tokens, chunk.banned_token_ids)
        if sequence.is_nonsense:
            token = (token + 1) % VOCAB
        sequence.output.append(token)
        return token
