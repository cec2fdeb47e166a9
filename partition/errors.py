"""The planner's errors. All are mistakes of the input, and say what would mend them."""

from __future__ import annotations


class PlanError(ValueError):
    """No plan exists for this model, cluster and constraints; the message names the nearest that
    does."""

    status_code = 400


class FieldError(PlanError):
    """A value that its field cannot take. ``where`` is the field's path in what was read
    ("nodes[0].link.bandwidth"), ``message`` what is wrong with it."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(where, message)
        self.where = where
        self.message = message

    def __str__(self) -> str:
        return f"{self.where or 'the document'}: {self.message}"

    def below(self, parent: str) -> FieldError:
        """The same, where ``parent`` is the path of what holds the field."""
        return FieldError(f"{parent}.{self.where}" if parent else self.where, self.message)


class BudgetError(PlanError):
    """The model does not fit. ``smallest`` maps "device_bytes", "host_bytes" and "nvme_bytes" to
    the least budget per shard with which, the others unchanged, a plan exists; what cannot mend it
    is left out."""

    def __init__(self, message: str, smallest: dict[str, int]) -> None:
        super().__init__(message, smallest)
        self.message = message
        self.smallest = smallest

    def __str__(self) -> str:
        return self.message


class UnsupportedArchitectureError(PlanError):
    """The model cannot run, or cannot be split the way that was asked; the message says why."""
