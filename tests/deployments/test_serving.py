"""The whole way: a real server, real HTTP, the official client, real kills.

Order matters: the last tests break the server and end it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
import transformers
from ray import serve
from server import API_KEY, CONTEXT, MODEL_NAME, Server, wait_until, write_model
from zoo import make_prompts, reference

from giantserve.client import Client, RetryPolicy
from giantserve.errors import EngineDeadError
from giantserve.free_ports import free_port

NUM_TOKENS = 32
LONG = 1500
PROMPTS = make_prompts((3, 17, 40, 9))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    """What transformers makes of the prompts, as text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.decode(ids, skip_special_tokens=False)
        for ids in reference(model, PROMPTS, NUM_TOKENS)
    ]


@pytest.fixture(scope="module")
def taken_port() -> Iterator[None]:
    """What Ray Serve would take for a listener of its own belongs to another program."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # one has it already
            held.enter_context(socket.create_server(("", 8500)))
        yield


@pytest.fixture(scope="module")
def server(
    model: Path, tmp_path_factory: pytest.TempPathFactory, taken_port: None
) -> Iterator[Server]:
    running = Server(model, tmp_path_factory.mktemp("server"), "pipeline_parallel=2")
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.fixture(scope="module")
def cluster(server: Server) -> Iterator[None]:
    """This process joins the server's Ray."""
    ray.init(address=server.ray_address(), namespace="serve", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=API_KEY, max_retries=0) as official:
        yield official


def engine_stats() -> dict[str, Any]:
    stats: dict[str, Any] = serve.get_app_handle("giantserve").stats.remote().result(timeout_s=30)
    return stats


def shard_actors() -> list[Any]:
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData

    accessor = state._connect_and_get_accessor()
    actors = map(ActorTableData.FromString, accessor.get_actor_table(None, None))
    alive = [a for a in actors if a.class_name == "ShardActor" and a.state == ActorTableData.ALIVE]
    return sorted(alive, key=lambda actor: int(actor.pid))


def test_start_says_the_plan_and_the_address(server: Server) -> None:
    assert server.ready_line.startswith(f"ready: {server.url} after ")
    plans = [line for line in server.stderr_path.read_text().splitlines() if line[:5] == "plan:"]
    assert len(plans) == 1 and "TP 1 x PP 2" in plans[0]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_those_of_transformers(
    client: openai.OpenAI, expected: list[str], stream: bool
) -> None:
    options: dict[str, Any] = {"ignore_eos": True, "skip_special_tokens": False}
    for prompt, text in zip(PROMPTS, expected, strict=True):
        answer = client.completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            temperature=0,
            max_tokens=NUM_TOKENS,
            stream=stream,
            extra_body=options,
        )
        if stream:
            chunks = list(answer)  # type: ignore[arg-type]
            assert len(chunks) == NUM_TOKENS
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
            assert chunks[-1].choices[0].finish_reason == "length"
        else:
            assert answer.choices[0].text == text
            assert answer.usage is not None and answer.usage.completion_tokens == NUM_TOKENS


def test_a_batch_of_prompts_gives_each_its_own_answer(server: Server, expected: list[str]) -> None:
    answer = server.complete(prompt=PROMPTS, max_tokens=NUM_TOKENS, skip_special_tokens=False)
    assert [choice["text"] for choice in answer.json()["choices"]] == expected


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI, model: Path) -> None:
    messages: Any = [{"role": "user", "content": "def main():"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = tokenizer.decode(reference(model, [ids], NUM_TOKENS)[0])
    options: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": messages,
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
    }
    whole = client.chat.completions.create(**options)
    chunks = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    deltas = list(chunks)
    assert whole.choices[0].message.content == text
    assert "".join(c.choices[0].delta.content or "" for c in deltas if c.choices) == text
    assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == NUM_TOKENS


def test_models_and_health(server: Server, client: openai.OpenAI, cluster: None) -> None:
    assert [card.id for card in client.models.list()] == [MODEL_NAME]
    before = engine_stats()["generated_tokens"]
    assert httpx.get(f"{server.root_url}/health", timeout=30).json() == {"status": "ok"}
    assert engine_stats()["generated_tokens"] == before + 1


def test_shards_are_in_their_bundles(cluster: None) -> None:
    (group,) = ray.util.placement_group_table().values()
    assert list(group["bundles"]) == [0, 1, 2]
    identifier = group["placement_group_id"]
    actors = shard_actors()
    assert len(actors) == 2
    taken = []
    for actor in actors:
        resources = dict(actor.required_resources)
        for bundle in (0, 1, 2):
            if f"bundle_group_{bundle}_{identifier}" in resources:
                taken.append(bundle)
                held = resources[f"CPU_group_{bundle}_{identifier}"]
                assert held <= group["bundles"][bundle]["CPU"]
    assert sorted(taken) == [1, 2]


def test_metrics_arrive_in_rays_endpoint(server: Server, cluster: None) -> None:
    server.complete(prompt=[5], max_tokens=1)
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def told() -> bool:
        lines = httpx.get(url, timeout=10).text.splitlines()
        seen = [line for line in lines if line.startswith("ray_giantserve_")]
        names = ("requests", "ttft_seconds", "tokens", "engine")
        return all(any(f"ray_giantserve_{name}" in line for line in seen) for name in names)

    wait_until("the metrics are exported", told)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_blocks(server: Server, cluster: None, stream: bool) -> None:
    full = engine_stats()["kv"]["device_blocks"]

    def run(hang_up: bool) -> tuple[int, int, float]:
        """Tokens made, requests aborted, and seconds from the first pass to all blocks free."""
        before = engine_stats()
        body = {"model": MODEL_NAME, "prompt": [7, 8, 9], "max_tokens": LONG, "ignore_eos": True}
        payload = json.dumps({**body, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + payload)
            if not hang_up:
                connection.settimeout(60)
                received = bytearray()
                wait_until("it runs", lambda: engine_stats()["kv"]["device_blocks_free"] < full)
                started_s = time.monotonic()
                while b'"length"' not in received:
                    received += connection.recv(65536)
            else:
                wait_until("it runs", lambda: engine_stats()["kv"]["device_blocks_free"] < full)
                started_s = time.monotonic()
        wait_until("its blocks are free", lambda: _all_free(full))
        elapsed_s = time.monotonic() - started_s
        after = engine_stats()
        tokens = after["generated_tokens"] - before["generated_tokens"]
        return tokens, after["aborted_requests"] - before["aborted_requests"], elapsed_s

    control_tokens, control_aborted, control_s = run(hang_up=False)
    assert LONG <= control_tokens <= LONG + 5 and control_aborted == 0
    tokens, aborted, freed_s = zip(*(run(hang_up=True) for _ in range(5)), strict=True)
    assert aborted == (1,) * 5
    assert max(tokens) < LONG / 2
    assert statistics.median(freed_s) < min(1.0, control_s / 2)


def _all_free(full: int) -> bool:
    stats = engine_stats()
    return bool(stats["kv"]["device_blocks_free"] == full and stats["running"] == 0)


BAD_REQUESTS: list[tuple[str, bytes | dict[str, Any], int, str]] = [
    ("unknown field", {"prompt": "x", "temprature": 1}, 400, "unknown field 'temprature'"),
    ("wrong type", {"prompt": "x", "max_tokens": "many"}, 400, "'max_tokens'"),
    ("negative", {"prompt": "x", "max_tokens": -1}, 400, "'max_tokens'"),
    ("over the context", {"prompt": [5] * (CONTEXT + 1)}, 400, f"context of {CONTEXT}"),
    ("outside the vocabulary", {"prompt": [512]}, 400, "vocabulary of 512"),
    ("unknown model", {"prompt": "x", "model": "other"}, 404, "'other' is not served"),
    ("ten megabytes", b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413, "bytes"),
    ("invalid UTF-8", b'{"prompt": "\xff\xfe"}', 400, "not valid JSON"),
    ("bad JSON", b'{"prompt": ', 400, "not valid JSON"),
    ("not an object", b"[]", 400, "JSON object"),
    ("empty", b"", 400, "not valid JSON"),
]


@pytest.mark.parametrize(
    ("body", "status", "says"), [b[1:] for b in BAD_REQUESTS], ids=[b[0] for b in BAD_REQUESTS]
)
def test_bad_requests_are_answered(
    server: Server, body: bytes | dict[str, Any], status: int, says: str
) -> None:
    content = json.dumps({"model": MODEL_NAME, **body}) if isinstance(body, dict) else body
    answer = server.http.post("/v1/completions", content=content)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert server.complete(prompt=[5], max_tokens=1).status_code == 200


def test_a_wrong_key_is_refused(server: Server) -> None:
    with (
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.completions.create(model=MODEL_NAME, prompt="x")


def test_a_taken_port_is_one_line(server: Server, model: Path) -> None:
    command = [sys.executable, "-m", "deployments", str(model), f"--port={server.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Address already in use" in done.stderr


def test_more_gpus_than_there_are_is_one_line(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deployments", str(model), f"--port={free_port()}"]
    options = [f"nvme_dir={tmp_path}", "allow_unused_tiers=true", "gpus_per_shard=64"]
    sizes = ["device_memory=32MiB", "host_memory=8MiB"]
    done = subprocess.run(
        [*command, *options, *sizes], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the replicas need 64 GPUs where the cluster has ")


def workers(server: Server) -> list[psutil.Process]:
    """The processes that the server's launcher forked."""
    (launcher,) = [
        process
        for process in server.processes()
        if "giantserve.executor.launcher_process" in process.cmdline()
        and process.ppid() == psutil.Process(server.process.pid).children()[0].pid
    ]
    return launcher.children()


@pytest.mark.parametrize("victim", ["actor", "worker"])
def test_a_killed_shard_fails_its_requests_and_is_replaced(
    server: Server, cluster: None, expected: list[str], victim: str
) -> None:
    victims = [int(actor.pid) for actor in shard_actors()]
    gang = workers(server)
    assert len(gang) == 2
    with Client(server.root_url, api_key=API_KEY, timeout_s=60) as ours:
        stream = ours.stream_complete([5], max_tokens=LONG, ignore_eos=True)
        next(stream)
        (psutil.Process(victims[0]) if victim == "actor" else gang[0]).kill()
        with pytest.raises(EngineDeadError, match="died"):
            list(stream)
    assert httpx.get(f"{server.root_url}/health", timeout=30).status_code == 503
    refused = server.complete(prompt=[5], max_tokens=1)
    assert refused.status_code == 503

    def died() -> bool:
        return not any(int(actor.pid) in victims for actor in shard_actors())

    wait_until("the gang is given up", died)
    _, alive = psutil.wait_procs(gang, timeout=30)
    assert not alive, "workers outlive their actors"
    # for as long as the replacement loads, and the proxy still asks the dead one, the answer is 503
    patient = RetryPolicy(max_retries=40, max_delay_s=4.0)
    with Client(server.root_url, api_key=API_KEY, timeout_s=60, retry=patient) as ours:
        for prompt, text in zip(PROMPTS, expected, strict=True):
            answer = ours.complete(
                prompt,
                temperature=0,
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                skip_special_tokens=False,
            )
            assert answer.text == text
    assert httpx.get(f"{server.root_url}/health", timeout=60).status_code == 200
    fresh = {int(actor.pid) for actor in shard_actors()}
    assert len(fresh) == 2 and not fresh & set(victims)


def test_sigterm_leaves_nothing(server: Server, cluster: None) -> None:
    ray.shutdown()
    processes = server.processes()
    assert len(processes) > 5
    assert server.stop() == 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, alive
    with socket.create_server(("127.0.0.1", server.port)):
        pass
