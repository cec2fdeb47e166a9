"""Fixtures that several areas share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from giantserve.executor.launcher import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """One process that forks the workers of all tests: imports are paid once."""
    with_imports = Launcher()
    yield with_imports
    with_imports.close()
