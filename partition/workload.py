"""What the plan is for: the requests to expect, what to optimise, and what the user has fixed."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, fields, replace

from kvcache.layout import STORAGE_DTYPES
from partition.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A typical request in tokens, how many run at once, and how long they may wait for the first
    token and for each further one, in seconds (None: as long as it takes)."""

    prompt_tokens: int = 512
    output_tokens: int = 128
    concurrency: int = 32
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None

    def __post_init__(self) -> None:
        _positive(self)

    @property
    def unlimited(self) -> Workload:
        """The same requests, which wait as long as it takes."""
        return replace(self, ttft_limit_s=None, tpot_limit_s=None)

    @property
    def context(self) -> int:
        """Tokens a sequence holds at its end."""
        return self.prompt_tokens + self.output_tokens


class Objective(enum.Enum):
    """What the best plan is best at, among those that keep the workload's limits."""

    MAX_THROUGHPUT = "max_throughput"
    MIN_TPOT = "min_tpot"  # at the whole concurrency, if it can be served at all
    MIN_TTFT = "min_ttft"
    LEAST_DEVICES = "least_devices"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What the user has fixed; None leaves it to the planner. ``layer_split`` is the number of
    layers of each stage in turn; ``kv_storage_dtypes`` are those (of
    `kvcache.layout.STORAGE_DTYPES`, kept in that order) among which the planner chooses how KV lies
    on host and NVMe: only the user may allow a lossy one; ``prefix_memory`` bytes of each shard's
    NVMe are for cached prefixes, beside what running sequences need."""

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    expert_parallel: bool | None = None
    layer_split: tuple[int, ...] | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    kv_storage_dtypes: tuple[str, ...] = ("auto",)
    prefix_memory: int | None = None

    def __post_init__(self) -> None:
        _positive(self)
        lossless_first = sorted(set(self.kv_storage_dtypes), key=STORAGE_DTYPES.index)
        object.__setattr__(self, "kv_storage_dtypes", tuple(lossless_first))


def _positive(options: Workload | Constraints) -> None:
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "expert_parallel":
            if value not in (None, True, False):
                raise PlanError(f"expert_parallel is {value}; it must be true or false")
        elif field.name == "kv_storage_dtypes":
            if not value or not set(value) <= set(STORAGE_DTYPES):
                said, known = ",".join(value), ", ".join(STORAGE_DTYPES)
                raise PlanError(f"kv_storage_dtype is {said!r}; there are {known}")
        elif field.name == "layer_split":
            if value is not None and (not value or min(value) < 1):
                raise PlanError(f"layer_split is {value}; each stage takes at least 1 layer")
        elif field.name.endswith("_s"):
            if value is not None and not 0 < value < math.inf:
                raise PlanError(f"{field.name} is {value}; it must be above 0 seconds")
        elif value is not None and (isinstance(value, bool) or value < 1):
            raise PlanError(f"{field.name} is {value}; it must be at least 1")
