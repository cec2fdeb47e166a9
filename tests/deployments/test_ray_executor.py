"""``LLM(..., executor="ray")``: shards as actors of a Ray that comes and goes with the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from zoo import make_prompts, reference, save_model

from giantserve.executor.base import CONNECT_TIMEOUT_S

PROMPTS = make_prompts((3, 17))
SCRIPT = """
import json, os, signal, sys
import ray
from giantserve import LLM, SamplingParams
from giantserve.errors import EngineDeadError
path, prompts = sys.argv[1], json.loads(sys.argv[2])
greedy = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
llm = LLM(path, executor="ray", tensor_parallel=2, device_memory="32MiB", host_memory="8MiB")
tokens = [output.token_ids for output in llm.generate(prompts, greedy)]
pids = llm._engine._executor.worker_pids
os.kill(pids[1], signal.SIGKILL)
try:
    llm.generate(prompts, greedy)
    error = None
except EngineDeadError as dead:
    error = str(dead)
llm.close()
print(json.dumps({"tokens": tokens, "pids": pids, "error": error, "ray": ray.is_initialized()}))
"""

DYING = """
import sys, time
from giantserve import LLM
from giantserve.errors import EngineDeadError
from giantserve.executor.ray import RayExecutor
start = RayExecutor._start_workers
RayExecutor._start_workers = lambda self, address, *rest: start(self, (address[0], 1), *rest)
begun_s = time.monotonic()
try:
    LLM(sys.argv[1], executor="ray", tensor_parallel=1, device_memory="32MiB", host_memory="8MiB")
except EngineDeadError as dead:
    print(time.monotonic() - begun_s, dead)
"""


def test_actors_give_the_same_tokens_and_their_death_is_told(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tokens"] == reference(path, PROMPTS, 16)
    assert len(set(told["pids"])) == 2
    assert "died" in told["error"]
    assert told["ray"] is False


def test_a_worker_that_does_not_connect_is_told_with_its_error(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    took_s, _, error = done.stdout.partition(" ")
    assert error.startswith("shard 0 died: ConnectionRefusedError: [Errno 111]")
    assert float(took_s) < CONNECT_TIMEOUT_S
