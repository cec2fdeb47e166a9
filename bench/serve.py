"""What Ray Serve and HTTP cost on top of the engine: TTFT at one client, tokens/s at many.

    python bench/serve.py --folder DIR [--rounds 3] [--output bench/results/FILE.md]

The same plan runs twice, once in an `AsyncEngine` of this process and once behind
``python -m deployments``. They take turns, with prompts that neither has seen; the one that is not
measured is idle.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import psutil
from report import header, spread
from shapes import write_checkpoint
from stream_client import Timeline, stream_completion

from giantserve.async_engine import AsyncEngine
from giantserve.demo_tokenizer import train_tokenizer
from giantserve.options import engine_config
from giantserve.sampling_params import SamplingParams

SHAPE = "llama-2.2gb"
VOCAB = 32000
PROMPT_TOKENS, OUTPUT_TOKENS, CLIENTS = 128, 32, 32
SINGLE_REQUESTS, SINGLE_TOKENS = 8, 4
OPTIONS = {
    "device_memory": "3GiB",
    "host_memory": "256MiB",
    "tensor_parallel": "1",
    "pipeline_parallel": "1",
    "max_model_len": "512",
    "max_num_seqs": str(CLIENTS),
}
Ask = Callable[[list[int], int], Awaitable[Timeline]]


class Measured:
    """One system and its rounds."""

    def __init__(self, name: str, ask: Ask) -> None:
        self.name = name
        self.ask = ask
        self.single: list[list[Timeline]] = []
        self.many: list[list[Timeline]] = []
        self.many_s: list[float] = []

    async def round(self, prompts: list[list[int]]) -> None:
        """One client after the other, then all at once."""
        alone, together = prompts[:SINGLE_REQUESTS], prompts[SINGLE_REQUESTS:]
        self.single.append([await self.ask(prompt, SINGLE_TOKENS) for prompt in alone])
        started_s = time.perf_counter()
        self.many.append(
            list(await asyncio.gather(*(self.ask(prompt, OUTPUT_TOKENS) for prompt in together)))
        )
        self.many_s.append(time.perf_counter() - started_s)

    @property
    def rates(self) -> list[float]:
        """Output tokens a second of each round, from the first request to the last token."""
        tokens = [sum(len(t.token_s) for t in each) for each in self.many]
        return [count / seconds for count, seconds in zip(tokens, self.many_s, strict=True)]

    def ttft_ms(self) -> list[float]:
        return [1e3 * t.ttft_s for each in self.single for t in each]

    def row(self) -> str:
        ttft = self.ttft_ms()
        many = [t for each in self.many for t in each]
        assert all(len(t.token_s) == OUTPUT_TOKENS for t in many), "a token was merged or lost"
        loaded = [1e3 * t.ttft_s for t in many]
        tpot = [1e3 * t.tpot_s for t in many]
        return (
            f"| {self.name} | {percentile(ttft, 50):.1f} / {percentile(ttft, 95):.1f} "
            f"| {spread(self.rates, 1)} | {percentile(loaded, 50):.0f} / "
            f"{percentile(loaded, 95):.0f} | {percentile(tpot, 50):.0f} / "
            f"{percentile(tpot, 95):.0f} |"
        )


class CpuUse:
    """CPU seconds of a tree of processes by their titles, between two looks."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.spent_s: dict[str, float] = defaultdict(float)
        self._before: dict[int, float] = {}

    def start(self) -> None:
        self._before = {pid: used for pid, _, used in self._look()}

    def stop(self) -> None:
        for pid, title, used in self._look():
            self.spent_s[title] += used - self._before.get(pid, 0.0)

    def _look(self) -> list[tuple[int, str, float]]:
        found = []
        for process in self._root.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                title = Path(" ".join(process.cmdline()[:1])).name.partition(".")[0]
                found.append((process.pid, title, times.user + times.system))
        return found


def percentile(values: list[float], percent: int) -> float:
    """The value that ``percent`` of the others do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def in_process(engine: AsyncEngine) -> Ask:
    """The engine's own streams."""
    count = 0

    async def ask(prompt: list[int], max_tokens: int) -> Timeline:
        nonlocal count
        count += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        timeline = Timeline(time.perf_counter())
        async for delta in engine.generate(prompt, params, request_id=f"bench-{count}"):
            timeline.token_s.extend([time.perf_counter()] * len(delta.token_ids))
        return timeline

    return ask


def over_http(port: int) -> Ask:
    """The same request to the server."""

    async def ask(prompt: list[int], max_tokens: int) -> Timeline:
        body = {
            "model": SHAPE,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return await stream_completion(port, body)

    return ask


def start_server(model: Path, port: int) -> subprocess.Popen[str]:
    """Returns when it is ready."""
    options = [f"{name}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "deployments", str(model), f"--port={port}"]
    process = subprocess.Popen(
        [*command, f"served_model_name={SHAPE}", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("ready: "):
        raise SystemExit("the server did not start")
    print(line, end="", file=sys.stderr)
    return process


async def measure(engine: AsyncEngine, server: int, port: int, rounds: int) -> str:
    """The report's body."""
    draw = random.Random(0)
    own = Measured("engine in process", in_process(engine))
    served = Measured("through Ray Serve", over_http(port))
    use = CpuUse(server)

    def prompts(count: int) -> list[list[int]]:
        return [[draw.randrange(6, VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(count)]

    for system in (own, served):
        await asyncio.gather(*(system.ask(prompt, 4) for prompt in prompts(8)))
    for number in range(rounds):
        order = (own, served) if number % 2 == 0 else (served, own)
        same = prompts(SINGLE_REQUESTS + CLIENTS)
        for system in order:
            if system is served:
                use.start()
            await system.round(same)
            if system is served:
                use.stop()
            print(f"round {number}: {system.name} {system.rates[-1]:.1f} tok/s", file=sys.stderr)
    added = percentile(served.ttft_ms(), 50) - percentile(own.ttft_ms(), 50)
    lost = 1 - statistics.median(served.rates) / statistics.median(own.rates)
    stats = await engine.stats()
    (shard,) = stats["shards"]
    tokens = sum(len(t.token_s) for each in served.single + served.many for t in each)
    received = sum(t.num_bytes for each in served.single + served.many for t in each)
    cpu = ", ".join(
        f"{title} {1e3 * spent / tokens:.2f}"
        for title, spent in sorted(use.spent_s.items(), key=lambda item: -item[1])
        if spent / tokens > 1e-5
    )
    read = shard["passes"] * shard["resident_bytes"]
    return "\n".join(
        [
            "| system | TTFT p50 / p95 at 1 client, ms | tokens/s at 32 clients: median (range) "
            "| TTFT p50 / p95 at 32, ms | TPOT p50 / p95 at 32, ms |",
            "|---|---|---|---|---|",
            own.row(),
            served.row(),
            "",
            f"- Serve adds {added:.1f} ms to the TTFT p50 at 1 client (target: at most 12)",
            f"- Serve loses {100 * lost:.1f} % of the tokens/s at {CLIENTS} clients "
            "(target: at most 8)",
            "- lost by round: "
            + ", ".join(
                f"{100 * (1 - mine / its):.1f} %"
                for mine, its in zip(served.rates, own.rates, strict=True)
            ),
            f"- CPU of the server, ms per token: {cpu}",
            f"- bytes received from the server: {received}, {received / tokens:.0f} a token",
            f"- weights read by the engine in process: {read / 1e9:.1f} GB in {shard['passes']} "
            f"passes, {read / shard['busy_s'] / 1e9:.1f} GB/s, "
            f"{100 * stats['roofline_fraction']:.0f} % of the measured ceiling of the memory "
            "(prefill, which is bound by compute, included)",
            f"- load average at the end: {psutil.getloadavg()[0]:.1f}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint lies")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file for the report, beside stdout")
    arguments = parser.parse_args()
    model = write_checkpoint(SHAPE, arguments.folder)
    if not (model / "tokenizer.json").exists():
        train_tokenizer(model, VOCAB)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    server = start_server(model, port)
    try:
        options = {**OPTIONS, "model": str(model)}
        engine = AsyncEngine(engine_config(options))
        body = asyncio.run(_run(engine, server.pid, port, arguments.rounds))
    finally:
        server.terminate()
        server.wait()
    workload = (
        f"- workload: {SHAPE}, bf16, random weights, all resident; {PROMPT_TOKENS} tokens in; "
        f"{SINGLE_REQUESTS} requests one by one ({SINGLE_TOKENS} out), then {CLIENTS} at once "
        f"({OUTPUT_TOKENS} out), streamed, greedy; {arguments.rounds} rounds in turns\n"
    )
    report = f"{header('What Ray Serve costs')}{workload}- plan: {engine.plan.reason}\n\n{body}\n"
    print(report)
    if arguments.output is not None:
        arguments.output.write_text(report)


async def _run(engine: AsyncEngine, server: int, port: int, rounds: int) -> str:
    try:
        return await measure(engine, server, port, rounds)
    finally:
        await engine.close()


if __name__ == "__main__":
    main()
