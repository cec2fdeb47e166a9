"""The demonstration: a model over its budgets, from nothing to answers over HTTP."""

from giantserve.demo.run import run_demo

__all__ = ["run_demo"]
