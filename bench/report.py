"""What every benchmark prints: where it ran, with what, and spreads."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import transformers


def run_mode(
    said: str | None, modes: Mapping[str, Callable[[Path, int], None]], rounds: int
) -> None:
    """The command line of a benchmark with modes: run the one asked for."""
    parser = argparse.ArgumentParser(
        description=said, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mode", choices=modes)
    parser.add_argument(
        "--folder", type=Path, default=Path(".bench"), help="where checkpoints are kept"
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    modes[options.mode](options.folder.absolute(), options.rounds)


def header(title: str) -> str:
    """A markdown heading with the command, the machine and the versions."""
    packages = ("torch", "transformers", "ray", "giantserve")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = " ".join(["python", *sys.argv])
    cpu = _cpu_name()
    return (
        f"# {title}\n\n- command: `{command}`\n- machine: {cpu}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()}\n- versions: Python "
        f"{platform.python_version()}, {versions}\n"
    )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median with the least and the greatest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"
