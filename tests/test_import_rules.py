"""The import rules of the packages, read from the sources and from what imports really load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("kvcache", "partition", "giantserve", "deployments", "tests", "bench")
ALLOWED = {
    "kvcache": set(),
    "partition": {"kvcache"},
    "giantserve": {"kvcache", "partition"},
    "deployments": {"kvcache", "partition", "giantserve"},
}
TENSOR_FREE_KVCACHE = {
    "kvcache.block_hash",
    "kvcache.errors",
    "kvcache.layout",
    "kvcache.micro_batch",
    "kvcache.tier",
}
HOMES = {
    "ray": ("giantserve.executor.ray", "deployments"),
    "fastapi": ("giantserve.api", "deployments"),
    "starlette": ("giantserve.api", "deployments"),
    "uvicorn": ("deployments",),
}
LAZY = ("pynvml", "deepspeed", "accelerate")
"""Imported inside the function that needs them, never when a module of ours is imported."""

LIGHT = (
    "giantserve",
    "giantserve.config",
    "giantserve.errors",
    "giantserve.free_ports",
    "giantserve.executor.messages",
    "giantserve.node",
    "giantserve.options",
    "giantserve.outputs",
    "giantserve.planning",
    "giantserve.prompt_ids",
    "giantserve.request",
    "giantserve.request_queue",
    "giantserve.sampling_params",
    "giantserve.sampling_row",
    "giantserve.scheduler",
    "giantserve.scheduler_config",
    "giantserve.sequence_output",
    "giantserve.shard_spec",
    "giantserve.step",
    "giantserve.stop_matcher",
    "giantserve.trace_file",
    "giantserve.units",
    "giantserve.client",
    "giantserve.cli",
    "kvcache.block_copy",
    "kvcache.block_hash",
    "kvcache.block_pool",
    "kvcache.errors",
    "kvcache.layout",
    "kvcache.micro_batch",
    "kvcache.tier",
    "kvcache.tier_blocks",
    "kvcache.trace",
    "partition",
    "partition.advice",
    "partition.assembly",
    "partition.bandwidths",
    "partition.cluster",
    "partition.cluster_yaml",
    "partition.codec",
    "partition.cost",
    "partition.device_pool",
    "partition.explain",
    "partition.hardware",
    "partition.layer_split",
    "partition.layout_search",
    "partition.links",
    "partition.memory_use",
    "partition.pass_work",
    "partition.plan",
    "partition.plan_queue",
    "partition.problem",
    "partition.profile",
    "partition.routing",
    "partition.scoring",
    "partition.search",
    "partition.sharding",
    "partition.sizing",
    "partition.smallest_budget",
    "partition.stage_orders",
    "partition.stage_table",
    "partition.stage_times",
    "partition.tier_choice",
    "partition.timeline",
    "partition.workload",
    "partition.yaml_lines",
)
HEAVY = ("torch", "ray", "transformers", "deepspeed", "accelerate", "fastapi", "pynvml")


def modules() -> Iterator[tuple[str, Path]]:
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports_of(name: str, *, at_import_only: bool = False) -> set[str]:
    """The modules that a module's source names in imports, type-checking ones included.

    ``at_import_only``: leave out those inside functions, which run later.
    """
    found: set[str] = set()
    is_package = MODULES[name].name == "__init__.py"

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and at_import_only:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return found


def belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 80
    assert "kvcache.tier" in imports_of("partition.plan")
    assert "pynvml" in imports_of("partition.machine")


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_only_what_lies_below_them(name: str) -> None:
    package = name.partition(".")[0]
    above = [p for p in OURS if p != package and p not in ALLOWED[package]]
    broken = sorted(i for i in imports_of(name) for p in above if belongs(i, p))
    assert not broken, f"{name} may not import {broken}"


def test_the_planner_knows_only_the_tensor_free_part_of_kvcache() -> None:
    used = {
        found
        for name in MODULES
        if belongs(name, "partition")
        for found in imports_of(name)
        if found in MODULES and belongs(found, "kvcache")
    }
    assert used - {"kvcache"} <= TENSOR_FREE_KVCACHE
    for name in TENSOR_FREE_KVCACHE:
        assert not {i for i in imports_of(name) if belongs(i, "torch")}


@pytest.mark.parametrize("name", MODULES)
def test_heavy_packages_stay_in_their_homes(name: str) -> None:
    for package, homes in HOMES.items():
        used = sorted(i for i in imports_of(name) if belongs(i, package))
        allowed = any(belongs(name, home) for home in homes)
        assert allowed or not used, f"{name} imports {used}; {package} belongs in {homes}"
    early = imports_of(name, at_import_only=True)
    for package in LAZY:
        assert not [i for i in early if belongs(i, package)], (
            f"{name}: import {package} when needed"
        )


def test_light_modules_load_nothing_heavy() -> None:
    """Each in a state of its own: one interpreter forks once a module, so it stays quick."""
    program = """
import importlib, json, os, sys
names, heavy = json.loads(sys.argv[1])
loaded = {}
for name in names:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        importlib.import_module(name)
        os.write(write, json.dumps([h for h in heavy if h in sys.modules]).encode())
        os._exit(0)
    os.close(write)
    loaded[name] = json.loads(os.read(read, 4096) or b'["it does not import"]')
    os.close(read)
    os.waitpid(pid, 0)
print(json.dumps(loaded))
"""

    def run(names: list[str]) -> dict[str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps([names, HEAVY])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        loaded: dict[str, list[str]] = json.loads(done.stdout)
        return loaded

    assert "torch" in run(["kvcache.arena"])["kvcache.arena"], "the check itself sees nothing"
    found = run(list(LIGHT))
    assert {name: heavy for name, heavy in found.items() if heavy} == {}


def test_the_wheel_lists_exactly_the_packages_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
    }
    assert sorted(listed) == sorted(folders)
    for package in folders:
        folder = ROOT.joinpath(*package.split("."))
        assert (folder / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_nothing_imports_tests_or_bench() -> None:
    assert [n for n in MODULES if any(belongs(i, p) for i in imports_of(n) for p in OURS[4:])] == []
