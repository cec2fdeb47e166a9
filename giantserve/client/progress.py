"""The progress bar of a batch."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def batch_progress(total: int | None, shown: bool) -> Generator[Callable[[int], None], None, None]:
    """Yield a function to call once a finished request with its completion tokens.

    Draws on stderr.
    """
    if not shown:
        yield lambda tokens: None
        return
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, tokens=0)
        count = 0

        def advance(tokens: int) -> None:
            nonlocal count
            count += tokens
            progress.update(task, advance=1, tokens=count)

        yield advance
