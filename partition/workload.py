"""What the plan is for: the requests to expect, what to optimise, and what the user has fixed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

from partition.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A typical request in tokens, and how many run at once."""

    prompt_tokens: int = 512
    output_tokens: int = 128
    concurrency: int = 32

    def __post_init__(self) -> None:
        _positive(self)

    @property
    def context(self) -> int:
        """Tokens a sequence holds at its end."""
        return self.prompt_tokens + self.output_tokens


class Objective(enum.Enum):
    """What the best plan is best at."""

    MAX_THROUGHPUT = "max_throughput"
    MIN_TPOT = "min_tpot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What the user has fixed; None leaves it to the planner."""

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    expert_parallel: bool | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16

    def __post_init__(self) -> None:
        _positive(self)


def _positive(options: Workload | Constraints) -> None:
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "expert_parallel":
            if value not in (None, True, False):
                raise PlanError(f"expert_parallel is {value}; it must be true or false")
        elif value is not None and (isinstance(value, bool) or value < 1):
            raise PlanError(f"{field.name} is {value}; it must be at least 1")
