"""``giantserve demo``: a model over its device budget, from nothing to answers."""

from __future__ import annotations


def demo() -> None:
    """Write a small random model, plan it over three tiers, serve it on Ray, and ask it."""
    from giantserve.demo import run_demo

    run_demo()
