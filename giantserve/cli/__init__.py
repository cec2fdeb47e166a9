"""The command ``giantserve``."""

from giantserve.cli.main import main

__all__ = ["main"]
