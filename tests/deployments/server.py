"""A real server: ``python -m deployments`` in a process of its own, and a look into its Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers
from zoo import COMMON

from giantserve.demo_tokenizer import train_tokenizer
from giantserve.free_ports import free_port

API_KEY = "test-key"
MODEL_NAME = "tiny"
CONTEXT = 2048
START_TIMEOUT_S = 180.0


def write_model(path: Path) -> Path:
    """A tiny fp32 Llama with a tokenizer."""
    torch.manual_seed(0)
    options = {**COMMON, "vocab_size": 512, "max_position_embeddings": CONTEXT}
    config = transformers.LlamaConfig(**options)
    config.dtype = torch.float32
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    train_tokenizer(path, 512)
    return path


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, f"waited in vain until {what}"
        time.sleep(0.02)


class Server:
    """Started by the constructor, which returns when it answers."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.root_url = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root_url}/v1"
        environment = {
            **os.environ,
            "GIANTSERVE_API_KEY": API_KEY,
            "RAY_AUTH_MODE": "disabled",  # so that the test can look into this Ray
            "RAY_metrics_report_interval_ms": "200",
        }
        self.stderr_path = folder / "stderr"
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "deployments",
                    str(model),
                    f"--port={self.port}",
                    f"served_model_name={MODEL_NAME}",
                    f"nvme_dir={folder / 'nvme'}",
                    "allow_unused_tiers=true",
                    "device_memory=32MiB",
                    "host_memory=8MiB",
                    *options,
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        assert self.ready_line.startswith("ready: "), self.stderr_path.read_text()
        self.http = httpx.Client(
            base_url=self.root_url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60.0
        )

    def processes(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def ray_address(self) -> str:
        """Where the server's own Ray listens."""
        for process in self.processes():
            for argument in process.cmdline() if process.name() == "raylet" else ():
                if argument.startswith("--gcs-address="):
                    return argument.partition("=")[2]
        raise AssertionError("the server has no raylet")

    def complete(self, **fields: Any) -> httpx.Response:
        """POST /v1/completions, greedy, with no end but ``max_tokens``."""
        body = {"model": MODEL_NAME, "temperature": 0, "ignore_eos": True, **fields}
        return self.http.post("/v1/completions", json=body)

    def stats(self) -> dict[str, Any]:
        """GET /stats."""
        stats: dict[str, Any] = self.http.get("/stats").json()
        return stats

    def stop(self) -> int:
        """SIGTERM to the whole job, as ``timeout`` and a shell send it; the exit status."""
        self.http.close()
        os.killpg(self.process.pid, signal.SIGTERM)
        return self.process.wait(60.0)
