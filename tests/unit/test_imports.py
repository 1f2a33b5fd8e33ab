"""Imports go one way, and Ray only into execution: read off the source, and tried in a process of its own."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rerank_ray

ROOT = Path(rerank_ray.__file__).parent

# Lowest first: a module imports from lower brackets, and from its own package.
BRACKETS = [
    ["errors", "records", "uncertainty"],
    ["storage"],
    ["schema", "config"],
    ["parquet"],
    ["settings", "runs"],
    ["formats", "prompts", "models", "losses", "metrics", "report"],
    ["retrieval", "label_store"],
    ["ranking", "distill"],
    ["stages", "shares", "quarantine", "accounting", "combine", "ingest", "evaluate", "selectivity", "prompt"],
    ["audit", "shuffle", "ingest_labels", "convert", "calibrate_exit", "planning", "export", "synthesize"],
    ["execution"],
    ["quickstart"],
    ["cli"],
]
# Commands that are nothing but a pipeline on a cluster; `cli` imports theirs when one is called.
ENTRY_POINTS = {"rerank_ray.quickstart.run"}
LEVEL = {part: level for level, bracket in enumerate(BRACKETS) for part in bracket}


@functools.cache
def modules() -> dict[str, Path]:
    """Name -> file of every module of the package."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def part_of(module: str) -> str:
    """`rerank_ray.models.engine` -> `models`."""
    return module.partition(".")[2].split(".")[0]


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, also inside functions."""
    known, found = set(modules()), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return {name for name in found if name.split(".")[0] == "rerank_ray"}


def test_every_part_has_its_place():
    """A new package or module has to be put into a bracket here."""
    assert {part_of(m) for m in modules()} - {""} == set(LEVEL)


def allowed(importer: str, target: str) -> bool:
    a, b = part_of(importer), part_of(target)
    if b in ("", a):
        return True
    if LEVEL[b] < LEVEL[a]:
        return True
    # What a backend answers is declared once, and templates fill it.
    return target == "rerank_ray.models.protocol"


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str):
    if module == "rerank_ray":
        return
    against = {target for target in imported(modules()[module]) if not allowed(module, target)}
    assert not against


def test_only_execution_names_ray():
    """Not even inside a function; the linter holds it too, this holds it where the linter is silenced."""
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        if part_of(module) != "execution":
            assert not {n for n in names if n.split(".")[0] == "ray"}, module


PROBE = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(m for m in sys.modules if m.split(".")[0] == "ray")))
"""


def test_importing_everything_else_leaves_ray_out():
    names = [m for m in modules() if part_of(m) != "execution" and m not in ENTRY_POINTS]
    result = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(names)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_a_label_jobs_driver_does_without_pytorch():
    """It takes ten seconds of a core to import what only the workers need."""
    probe = "import sys, rerank_ray.execution.data, rerank_ray.execution.pipeline; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert not {"torch", "transformers"} & set(result.stdout.split())
