"""What the HTTP face reports. Implementations decide where it goes; this package knows no Ray."""

from __future__ import annotations

from typing import Protocol


class Metrics(Protocol):
    """A sink of request measurements. Calls come from the event loop and must not block."""

    def request_finished(self, route: str, status: int, duration_s: float) -> None:
        """One request ended. A client that left counts as status 499."""

    def first_token(self, seconds: float) -> None:
        """Time from the arrival of the request to its first token."""

    def time_per_token(self, seconds: float) -> None:
        """Mean time between the tokens of one choice after the first."""

    def tokens(self, prompt: int, cached: int, completion: int) -> None:
        """Tokens of one finished request; ``cached`` of the prompt's came from the prefix cache."""


class NoMetrics:
    """Reports nothing."""

    def request_finished(self, route: str, status: int, duration_s: float) -> None:
        return None

    def first_token(self, seconds: float) -> None:
        return None

    def time_per_token(self, seconds: float) -> None:
        return None

    def tokens(self, prompt: int, cached: int, completion: int) -> None:
        return None
