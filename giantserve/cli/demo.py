"""``giantserve demo``: a model over its budgets, from nothing to answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Option(help="Where the model is kept.")] = Path(".demo"),
    model_size: Annotated[str, typer.Option(help="full (1.5 GB) or small (70 MB).")] = "full",
    keep: Annotated[bool, typer.Option("--keep", help="Serve on, until Ctrl-C.")] = False,
) -> None:
    """Write a random model, plan it over three tiers, serve it on Ray, and ask it."""
    from giantserve.demo import run_demo

    run_demo(folder, model_size, keep)
