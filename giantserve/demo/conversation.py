"""What the demonstration asks of the server, and what it measures while it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from giantserve.client import Client

QUESTION = "Write a haiku about memory that is never enough."
PROMPTS = (
    "import os",
    "def main",
    "class Shard",
    "for unit in",
    "return",
    "raise",
    "with open",
    "#",
)
CHAT_TOKENS = 24
BATCH_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One part of the conversation. ``moved_bytes`` is by (source, target) tier, of all shards."""

    num_tokens: int
    seconds: float
    first_token_s: float | None
    moved_bytes: Mapping[tuple[str, str], int]
    passes: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def disk_read(self) -> float:
        """Bytes/s that left the disk, over the whole time: waiting counts."""
        moved = sum(count for (source, _), count in self.moved_bytes.items() if source == "nvme")
        return moved / self.seconds


def stream_chat(client: Client, write: Callable[[str], None]) -> Measured:
    """Stream one answer, handing each piece of text to ``write`` as it comes."""
    before = client.stats()
    started_s = time.perf_counter()
    first_s = None
    options = {"max_tokens": CHAT_TOKENS, "ignore_eos": True, "temperature": 0.7, "seed": 1}
    for text in client.stream_chat(QUESTION, **options):
        first_s = first_s or time.perf_counter() - started_s
        write(text)
    return _measured(client, before, started_s, CHAT_TOKENS, first_s)


def complete_batch(client: Client) -> tuple[list[str], Measured]:
    """Complete all prompts at once; their texts, and the measurement."""
    before = client.stats()
    started_s = time.perf_counter()
    options: dict[str, Any] = {
        "max_tokens": BATCH_TOKENS,
        "ignore_eos": True,
        "temperature": 0.7,
        "seed": 1,
    }
    replies = client.batch(PROMPTS, progress=True, **options)
    tokens = sum(reply.usage.completion_tokens for reply in replies)
    measured = _measured(client, before, started_s, tokens, None)
    return [reply.text for reply in replies], measured


def _measured(
    client: Client,
    before: dict[str, Any],
    started_s: float,
    num_tokens: int,
    first_token_s: float | None,
) -> Measured:
    seconds = time.perf_counter() - started_s
    after = client.stats()
    earlier = _moved_bytes(before)
    moved = {link: count - earlier.get(link, 0) for link, count in _moved_bytes(after).items()}
    return Measured(
        num_tokens=num_tokens,
        seconds=seconds,
        first_token_s=first_token_s,
        moved_bytes={link: count for link, count in moved.items() if count},
        passes=after["passes"] - before["passes"],
    )


def _moved_bytes(stats: dict[str, Any]) -> dict[tuple[str, str], int]:
    moved: dict[tuple[str, str], int] = {}
    for shard in stats["shards"]:
        for link in shard["links"]:
            between = link["source"], link["target"]
            moved[between] = moved.get(between, 0) + link["bytes"]
    return moved
