"""The demonstration from its first line to its last."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from giantserve.client import Client
from giantserve.demo.conversation import QUESTION, complete_batch, stream_chat
from giantserve.demo.disk_ceiling import DiskCeiling
from giantserve.demo.report import measured_table, plan_table, shares
from giantserve.demo.server import Server
from giantserve.demo.shape import SHAPES, DemoShape
from giantserve.errors import ConfigError
from giantserve.interrupts import no_lost_interrupts
from giantserve.options import engine_config
from partition.plan import PartitionPlan

PIPELINE_PARALLEL = 2
MAX_NUM_SEQS = 8
MAX_MODEL_LEN = 512
BATCH_SHOWN = 3


def run_demo(folder: Path, model_size: str = "full", keep: bool = False) -> None:
    """Write the model (once), plan it, serve it on Ray, ask it, print what was measured.

    ``keep`` leaves the server up afterwards, until Ctrl-C. Raises ConfigError for an unknown
    ``model_size``; whatever happens, no process is left.
    """
    if model_size not in SHAPES:
        raise ConfigError(f"model size '{model_size}' is unknown; there are {', '.join(SHAPES)}")
    console = Console()
    shape = SHAPES[model_size]
    model, nvme = (folder.absolute() / f"{model_size}-{part}" for part in ("model", "nvme"))
    with _interrupted_by_signals(console), no_lost_interrupts():
        _heading(console, 1, "A model of random weights")
        _prepare(console, shape, model)
        options = {
            "served_model_name": "demo",
            "device_memory": shape.device_memory,
            "host_memory": shape.host_memory,
            "nvme_dir": nvme,
            "pipeline_parallel": PIPELINE_PARALLEL,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_model_len": MAX_MODEL_LEN,
        }
        _heading(console, 2, "A plan for it")
        plan = _plan(console, shape, model, options)
        _heading(console, 3, "A server on Ray Serve")
        started_s = time.monotonic()
        with Server(model, options) as server, Client(server.url) as client:
            console.print(f"{server.url}/v1 answers after {time.monotonic() - started_s:.0f} s\n")
            ceiling = DiskCeiling(nvme / "weights", len(plan.shards))
            ceiling.probe()
            _heading(console, 4, f'A chat, streamed: "{QUESTION}"')
            chat = stream_chat(client, lambda text: console.out(text, end="", highlight=False))
            console.print("\n")
            ceiling.probe()
            _heading(console, 5, f"A batch of {MAX_NUM_SEQS} completions")
            texts, batch = complete_batch(client)
            ceiling.probe()
            for text in texts[:BATCH_SHOWN]:
                console.out(f"  {text!r}", highlight=False)
            console.print(f"  and {len(texts) - BATCH_SHOWN} more\n")
            console.print(measured_table(plan, chat, batch, ceiling.bytes_per_s))
            if keep:
                _wait(console, server)
            console.print("stopping the server")
        console.print(f"done; nothing is left running. {folder} keeps the model for next time.")


def _heading(console: Console, number: int, text: str) -> None:
    console.print(f"[bold]{number}. {text}[/bold]")


def _prepare(console: Console, shape: DemoShape, model: Path) -> None:
    console.print("The weights are random, so every answer will be noise; the machinery is real.")
    if (model / "config.json").exists():
        console.print(f"{model} is there from last time\n")
        return
    from giantserve.demo.checkpoint import write_checkpoint

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("training a tokenizer", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, description="writing the model", completed=done, total=total)

        write_checkpoint(shape, model, advance)
    console.print(f"wrote {model}\n")


def _plan(
    console: Console, shape: DemoShape, model: Path, options: dict[str, object]
) -> PartitionPlan:
    with console.status("measuring this machine, planning"):
        from giantserve.planning import plan_for

        plan = plan_for(engine_config({"model": str(model), **options}))
    console.print(
        f"{shares(plan)}.\nEach of the two shards may use {shape.device_memory} of device and "
        f"{shape.host_memory} of host memory."
    )
    console.print(plan_table(plan))
    console.print(
        f"forecast: a decode pass takes {plan.forecast.decode_pass_s:.2f} s and yields "
        f"{plan.forecast.tokens_per_s:.1f} tokens/s; the limit is the {plan.forecast.binds}\n"
    )
    return plan


def _wait(console: Console, server: Server) -> None:
    console.print(f"giantserve chat --url {server.url}   talks to it; Ctrl-C ends it")
    try:
        signal.pause()
    except KeyboardInterrupt:
        console.print()


@contextmanager
def _interrupted_by_signals(console: Console) -> Iterator[None]:
    """SIGTERM and SIGHUP end the demonstration as Ctrl-C does: with everything cleaned up."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        console.print("\ninterrupted; nothing is left running")
        raise
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
