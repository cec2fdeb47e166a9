"""The offline face: a model, a list of prompts, a list of outputs. No Ray needed."""

from __future__ import annotations

import itertools
import logging
import queue
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from giantserve.config import EngineConfig
from giantserve.engine import Engine
from giantserve.errors import ConfigError, GiantserveError, InvalidRequestError
from giantserve.executor.launcher import Launcher
from giantserve.executor.messages import LoadProgress
from giantserve.outputs import Completion, RequestOutput, StreamDelta
from giantserve.prompt_ids import Prompt, as_batch, check_token_ids
from giantserve.sampling_params import SamplingParams
from giantserve.units import parse_bytes
from partition.plan import PartitionPlan


class LLM:
    """A model held in a replica on this machine (``executor="local"``) or on Ray (``"ray"``).

    Memory sizes are bytes or strings such as "2GiB", per shard; whatever is left out the planner
    chooses from the machine, and a line of the log says what and why (on stderr, unless the program
    has set up logging itself). ``options`` are the other fields of `EngineConfig`; ``plan`` is run
    in place of the planner's own. However many prompts a call brings, they wait, unless
    ``max_queued_requests`` says otherwise. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        nvme_memory: int | str | None = None,
        prefix_memory: int | str | None = None,
        nvme_dir: str | Path | None = None,
        trace: str | Path | None = None,
        plan: PartitionPlan | None = None,
        on_progress: Callable[[int, LoadProgress], None] = lambda rank, progress: None,
        launcher: Launcher | None = None,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"LLM has no option {', '.join(unknown)}")
        options.setdefault("max_queued_requests", sys.maxsize)
        config = EngineConfig(
            model=str(model),
            device_memory=_bytes("device_memory", device_memory),
            host_memory=_bytes("host_memory", host_memory),
            nvme_memory=_bytes("nvme_memory", nvme_memory),
            prefix_memory=_bytes("prefix_memory", prefix_memory),
            nvme_dir=None if nvme_dir is None else Path(nvme_dir),
            trace=None if trace is None else Path(trace),
            **options,
        )
        _show_log()
        self._engine = Engine(config, plan=plan, on_progress=on_progress, launcher=launcher)
        try:
            self._engine.wait_until_loaded()
        except BaseException:
            self._engine.close()
            raise
        self._calls = itertools.count(1)

    @property
    def plan(self) -> PartitionPlan:
        """What the planner decided."""
        return self._engine.plan

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt and output together."""
        return self._engine.max_model_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
    ) -> list[RequestOutput]:
        """Complete every prompt (text, or token ids); outputs come in the order of the prompts.

        ``params`` is one for all or one a prompt. Raises InvalidRequestError before anything runs,
        and whatever ends the engine.
        """
        batch = as_batch(prompts)
        each = _as_params(params, len(batch))
        call = next(self._calls)
        inbox: queue.SimpleQueue[tuple[int, float, StreamDelta | GiantserveError]]
        inbox = queue.SimpleQueue()
        ids = [self._token_ids(prompt) for prompt in batch]
        for own in each:
            own.check_vocab(self._engine.profile.vocab_size)
        outputs = [
            RequestOutput(
                request_id=f"{call}-{index}",
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=list(token_ids),
                choices=[Completion(index=i) for i in range(own.n)],
            )
            for index, (prompt, token_ids, own) in enumerate(zip(batch, ids, each, strict=True))
        ]
        left = len(outputs)
        started = time.monotonic()
        try:
            with self._engine.together():
                for index, (output, own) in enumerate(zip(outputs, each, strict=True)):
                    self._engine.submit(
                        output.request_id,
                        output.prompt_token_ids,
                        own,
                        lambda item, i=index: inbox.put((i, time.monotonic(), item)),  # type: ignore[misc]
                        tenant=tenant,
                    )
            while left:
                index, now, item = inbox.get()
                if isinstance(item, GiantserveError):
                    raise item
                outputs[index].add(item, now - started)
                left -= item.usage is not None
        finally:
            if left:
                for output in outputs:
                    self._engine.abort(output.request_id)
        return outputs

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """Answer one conversation, rendered by the model's chat template."""
        if self._engine.tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer; call generate with token ids")
        return self.generate([self._engine.tokenizer.render_chat(messages)], params)[0]

    def stats(self) -> dict[str, Any]:
        """Plain data: queues, KV blocks, tokens, bytes by tier and direction, GB/s, and the
        fraction of the roofline."""
        return self._engine.stats()

    def close(self) -> None:
        """End the shards. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._engine.tokenizer is None:
                raise InvalidRequestError(
                    "this model has no tokenizer; pass token ids instead of text"
                )
            prompt = self._engine.tokenizer.encode(prompt)
        return check_token_ids(prompt, self._engine.profile.vocab_size, self.max_model_len)


def _show_log() -> None:
    logger = logging.getLogger("giantserve")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _bytes(name: str, value: int | str | None) -> int | None:
    if isinstance(value, str):
        value = parse_bytes(value)
    if value is not None and (not isinstance(value, int) or value < 0):
        raise ConfigError(f"{name} is {value}; give a whole number of at least 0 bytes")
    return value


def _as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} sampling params for {count} prompts; give one a prompt"
        )
    return list(params)
