"""Every command and every example of the README, run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from newcomer import ROOT, Newcomer, readme_blocks, readme_commands

OFFLINE = ("doctor", "plan", "pack", "generate")
ONLINE = ("chat",)
README = (ROOT / "README.md").read_text()


def test_no_command_is_left_out() -> None:
    lines = "".join(readme_blocks("bash")).splitlines()
    programs = ("make", "curl", "giantserve", "export", "ray", "serve")
    known = [words for program in programs for words in readme_commands(program)]
    assert len(known) == len([line for line in lines if line.strip()]) > 10
    assert {words[1] for words in readme_commands("giantserve")} == {*OFFLINE, *ONLINE, "serve"}
    assert set(re.findall(r"^```(\w+)$", README, re.M)) == {"bash", "python", "text"}


@pytest.mark.parametrize("words", readme_commands("make"), ids=" ".join)
def test_make_knows_its_targets(words: list[str]) -> None:
    """What `make demo` runs is run in tests/demo; `make test` is what runs this."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", *words[1:]]
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    )
    last = done.stdout.splitlines()[-1]
    starts = {"demo": ".venv/bin/giantserve demo", "test": ".venv/bin/pytest"}
    assert last.startswith(starts[words[1]])


@pytest.mark.parametrize(
    "words", [w for w in readme_commands("giantserve") if w[1] in OFFLINE], ids=lambda w: str(w[1])
)
def test_commands_without_a_server(newcomer: Newcomer, words: list[str]) -> None:
    output = newcomer.run(words)
    says = {
        "doctor": "CPU",
        "plan": "forecast:",
        "pack": "shard 1: the plan keeps no weights on NVMe",
        "generate": "Once upon a time",
    }
    assert says[words[1]] in output


MEASURED = "my-cluster.yaml"
"""The file of a Ray cluster; its commands are run where there is one."""

PLANNING = [
    words
    for words in readme_commands("giantserve", "docs/planning.md")
    if words not in readme_commands("giantserve") and MEASURED not in words
]


@pytest.mark.parametrize("words", PLANNING, ids=" ".join)
def test_commands_about_planning(newcomer: Newcomer, words: list[str]) -> None:
    assert "forecast:" in newcomer.run(words)


@pytest.mark.parametrize("words", readme_commands("curl"), ids=lambda w: str(w[1].split("/", 3)[3]))
def test_curl(server: Newcomer, words: list[str]) -> None:
    output = server.run([*words, "--silent", "--show-error", "--fail"])
    if "stream" in words[-1]:
        events = [line for line in output.splitlines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events[:-1]]
        assert any(delta.get("content") for delta in deltas)
    else:
        answer = json.loads(output)
        path = words[1].rpartition("/")[2]
        key = {"models": "data", "health": "status", "stats": "shards"}[path]
        assert answer[key]


def test_chat(server: Newcomer) -> None:
    (words,) = (w for w in readme_commands("giantserve") if w[1] == "chat")
    assert server.run(words).strip()


@pytest.mark.parametrize("index", range(len(readme_blocks("python"))))
def test_python(server: Newcomer, index: int) -> None:
    assert server.run([sys.executable, "-c", readme_blocks("python")[index]]).strip()


def test_the_openai_client_works_unchanged(server: Newcomer) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="my-model", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 4


def test_examples(server: Newcomer) -> None:
    folder = ROOT / "examples"
    prompts = ["Once upon a time", "In the beginning"]
    offline = server.run([sys.executable, str(folder / "offline.py"), "./my-model", *prompts])
    assert all(f"{prompt!r} -> " in offline for prompt in prompts)
    online = server.run([sys.executable, str(folder / "client.py"), "http://127.0.0.1:8000"])
    assert online.count("tokens)") == 3
    assert {path.name for path in folder.glob("*.py")} == {"offline.py", "client.py"}


def test_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [
        (document, link)
        for document in documents
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    ]
    assert len(links) >= 5
    assert [link for document, link in links if not (document.parent / link).exists()] == []
