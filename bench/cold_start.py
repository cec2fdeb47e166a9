"""From `giantserve serve` to the first token over HTTP, the page cache dropped before.

python bench/cold_start.py   the 2.2 GB Llama shape with 90 % on NVMe and a store that is packed:
                             ours, one sequential read of the store, and a Ray Serve that only says
                             hello, in turns
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from direct_reads import best_settings, read_rate
from offline import newest_store
from report import header, spread
from shapes import write_checkpoint

from giantserve.free_ports import free_port

SHAPE = "llama-2.2gb"
DEVICE_MEMORY = "700MiB"
TIMEOUT_S = 180.0
HELLO = """
import sys, ray, signal
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions
app = FastAPI()
@serve.deployment
@serve.ingress(app)
class Hello:
    @app.post("/v1/completions")
    def hello(self):
        return {}
ray.init(address="local", include_dashboard=False, log_to_driver=False,
         object_store_memory=128 << 20)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[1])))
serve.run(Hello.bind())
signal.pause()
"""


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[None]:
    """The command as a process group of its own, ended afterwards as a user would."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def first_answer(command: Sequence[str], port: int, model: str) -> float:
    """Seconds from the start of the command to a completion of one token."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0}
    drop_page_cache()
    begin = time.perf_counter()
    with running(command):
        while time.perf_counter() - begin < TIMEOUT_S:
            with contextlib.suppress(httpx.HTTPError):
                url = f"http://127.0.0.1:{port}/v1/completions"
                if httpx.post(url, json=body, timeout=TIMEOUT_S).status_code == 200:
                    return time.perf_counter() - begin
            time.sleep(0.02)
    raise SystemExit(f"no answer within {TIMEOUT_S:.0f} s of {' '.join(command)}")


def drop_page_cache() -> None:
    """So that nothing is read from memory; says so where this user may not."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"(the page cache stays: {error})")


def main() -> None:
    """All in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(".bench"), help="where checkpoints are kept"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = write_checkpoint(SHAPE, folder)
    nvme_dir = folder / "nvme-cold"
    port = free_port()
    serve = [sys.executable, "-m", "giantserve", "serve", str(path), f"--port={port}"]
    serve += [f"--nvme-dir={nvme_dir}", f"--device-memory={DEVICE_MEMORY}", "--host-memory=0"]
    serve += ["--max-model-len=512", "--served-model-name=m"]
    print(header("Cold start"))
    first_answer(serve, port, "m")  # packs the store, and measures the machine
    store = newest_store(nvme_dir)
    num_bytes = store.stat().st_size
    settings = best_settings(store, num_bytes)
    ours, reads, hellos = [], [], []
    for _ in range(options.rounds):
        reads.append(num_bytes / read_rate(store, num_bytes, *settings))
        ours.append(first_answer(serve, port, "m"))
        hellos.append(first_answer([sys.executable, "-c", HELLO, str(port)], port, "m"))
    beyond = [a - 1.15 * b for a, b in zip(ours, reads, strict=True)]
    print(f"a store of {num_bytes / 1e9:.2f} GB\n")
    print("| | s |")
    print("|---|---|")
    print(f"| `giantserve serve` to the first token | {spread(ours, 2)} |")
    print(f"| one sequential read of the store | {spread(reads, 2)} |")
    print(f"| start beyond 1.15 reads | {spread(beyond, 2)} |")
    print(f"| a Ray Serve that says hello | {spread(hellos, 2)} |")
    print("\n(target: at most 6 s beyond 1.15 reads)")


if __name__ == "__main__":
    main()
