"""``python -m giantserve``: the command line."""

from __future__ import annotations

from giantserve.cli import main

main()
