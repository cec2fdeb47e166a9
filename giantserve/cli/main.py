"""The commands, and how a failure looks: one line on stderr."""

from __future__ import annotations

import sys

import typer

from giantserve.cli.chat import chat
from giantserve.cli.demo import demo
from giantserve.cli.doctor import doctor
from giantserve.cli.generate import generate
from giantserve.cli.pack import pack
from giantserve.cli.plan import plan
from giantserve.cli.serve import serve
from giantserve.errors import GiantserveError

EPILOG = """Examples:

giantserve doctor

giantserve plan ./my-model --device-memory 8GiB --pipeline-parallel 2

giantserve serve ./my-model --device-memory 8GiB --host-memory 32GiB --nvme-dir /nvme

giantserve chat --message "Hello"
"""

app = typer.Typer(
    name="giantserve",
    help="Serve language models that do not fit the accelerators you have.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command, epilog in (
    (serve, "Example: giantserve serve ./my-model --device-memory 2GiB --port 8000"),
    (generate, 'Example: giantserve generate ./my-model --prompt "Once upon a time"'),
    (chat, 'Example: giantserve chat --url http://127.0.0.1:8000 --message "Hello"'),
    (plan, "Example: giantserve plan ./my-model --device-memory 2GiB --json"),
    (pack, "Example: giantserve pack ./my-model --device-memory 2GiB --nvme-dir /nvme"),
    (demo, "Example: giantserve demo"),
    (doctor, "Example: giantserve doctor --nvme-dir /nvme"),
):
    app.command(epilog=epilog)(command)


def main() -> None:
    """The entry point. Exits 0 on success, 1 on an error, 2 on wrong usage, 130 on Ctrl-C."""
    try:
        app(prog_name="giantserve")
    except GiantserveError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        from kvcache.errors import TierError
        from partition.errors import PlanError

        if not isinstance(error, PlanError | TierError):
            raise
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"giantserve: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
