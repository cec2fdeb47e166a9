"""What the README says, and someone who types it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORT = "8000"
"""As the README has it; the tests put a free one in its place."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Someone in a folder with a model in it, who types what the documents say."""

    folder: Path
    port: str

    @property
    def environment(self) -> dict[str, str]:
        here = str(Path(sys.executable).parent)
        cache = str(self.folder / "cache")
        return {**os.environ, "PATH": f"{here}:{os.environ['PATH']}", "XDG_CACHE_HOME": cache}

    def here(self, text: str) -> str:
        """The text with this session's port in place of the documents'."""
        return re.sub(rf"\b{PORT}\b", self.port, text)

    def run(self, command: list[str], timeout_s: float = 120.0) -> str:
        """Run it; the output, once it ended well."""
        done = subprocess.run(
            [self.here(word) for word in command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def readme_blocks(language: str, document: str = "README.md") -> list[str]:
    """The fenced blocks of the README, or of another document, in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)


def readme_commands(program: str, document: str = "README.md") -> list[list[str]]:
    """The command lines there that start with ``program``, as words."""
    lines = "".join(readme_blocks("bash", document)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))[0] == program]
