"""The engine for asyncio: one async iterator of deltas a request."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from giantserve.config import EngineConfig
from giantserve.engine import Engine
from giantserve.errors import EngineDeadError, GiantserveError, OverflowedError, QueueFullError
from giantserve.executor.launcher import Launcher
from giantserve.executor.messages import LoadProgress
from giantserve.outputs import StreamDelta
from giantserve.planning import Resolution
from giantserve.sampling_params import SamplingParams
from giantserve.tokenizer import Tokenizer
from partition.plan import PartitionPlan

STALL_TIMEOUT_S, LOAD_STALL_TIMEOUT_S = 60.0, 600.0
STALL_LAYERS = 10
STALL_CHECK_PERIOD_S = 1.0
Item = StreamDelta | GiantserveError


class AsyncEngine:
    """Wraps an `Engine`. Requests are taken while the rest of the model loads.

    The deltas of one pass reach the event loop in one wake-up, however many requests they belong
    to, and while the next pass runs.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        plan: PartitionPlan | None = None,
        resolution: Resolution | None = None,
        on_progress: Callable[[int, LoadProgress], None] = lambda rank, progress: None,
        launcher: Launcher | None = None,
    ) -> None:
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Item], Item]]] = {}
        """Filled and emptied by the engine's thread alone."""
        self._engine = Engine(
            config,
            plan=plan,
            resolution=resolution,
            on_progress=on_progress,
            launcher=launcher,
            flush=self._flush,
        )
        self.config = self._engine.config

    @property
    def plan(self) -> PartitionPlan:
        """What the planner decided."""
        return self._engine.plan

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self._engine.model_name

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt and output together."""
        return self._engine.max_model_len

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where the checkpoint has none."""
        return self._engine.tokenizer

    @property
    def failure(self) -> GiantserveError | None:
        """What ended the engine, or None while it is well."""
        return self._engine.failure

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> AsyncIterator[StreamDelta]:
        """Yield the request's deltas as they come.

        Closing the iterator, or cancelling the task that awaits it, aborts the request and frees
        its blocks.

        Raises QueueFullError, InvalidRequestError or EngineDeadError.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Item] = asyncio.Queue()

        def sink(item: Item) -> None:
            self._outbox.setdefault(loop, []).append((deltas, item))

        self._engine.submit(
            request_id,
            prompt_token_ids,
            params,
            sink,
            tenant=tenant,
            priority=priority,
            deadline_s=deadline_s,
        )
        ended = False
        try:
            while not ended:
                item = await deltas.get()
                if isinstance(item, GiantserveError):
                    ended = True
                    raise item
                ended = item.usage is not None
                yield item
        finally:
            if not ended:
                self._engine.abort(request_id)

    def _flush(self) -> None:
        for loop, items in self._outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its requests with it
                loop.call_soon_threadsafe(_deliver, items)
        self._outbox.clear()

    async def wait_until_loaded(self) -> None:
        """See `Engine.wait_until_loaded`."""
        await asyncio.to_thread(self._engine.wait_until_loaded)

    async def check_health(self) -> None:
        """Generate one token, however long a pass takes; raises what `check_stall` raises."""
        token = asyncio.ensure_future(self._one_token())
        try:
            while not (await asyncio.wait({token}, timeout=STALL_CHECK_PERIOD_S))[0]:
                self.check_stall()
            token.result()
            self.check_stall()  # a full queue takes no request for a token
        finally:
            token.cancel()

    def check_stall(self) -> None:
        """Raises EngineDeadError where passes do not get on for much longer than a layer should
        take; while weights load, which a pass waits for, for `LOAD_STALL_TIMEOUT_S`."""
        layer_s = self.plan.forecast.decode_pass_s / self.plan.stages[-1].end_layer
        timeout_s = max(STALL_TIMEOUT_S, STALL_LAYERS * layer_s)
        if not self._engine.is_loaded:
            timeout_s = max(timeout_s, LOAD_STALL_TIMEOUT_S)
        if self._engine.stalled_s > timeout_s:
            raise EngineDeadError(f"no layer began within {timeout_s:.0f} s")

    async def _one_token(self) -> None:
        if self._engine.failure is not None:
            raise EngineDeadError(str(self._engine.failure))
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request_id = f"health-{secrets.token_hex(8)}"
        # With a full queue it has enough to do, and stalls or does not; logits are the model's.
        with contextlib.suppress(QueueFullError, OverflowedError):
            async for _ in self.generate([0], params, request_id=request_id, priority=1):
                pass

    async def stats(self) -> dict[str, Any]:
        """See `Engine.stats`."""
        return await asyncio.to_thread(self._engine.stats)

    async def close(self) -> None:
        """End the engine and its shards."""
        await asyncio.to_thread(self._engine.close)


def _deliver(items: list[tuple[asyncio.Queue[Item], Item]]) -> None:
    for deltas, item in items:
        deltas.put_nowait(item)
