"""The arrows of ARCHITECTURE.md: who may import whom, one door to private JAX, and what importing funcgrad costs and leaves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "transforms"
FILES = sorted([*ENGINE.rglob("*.py"), *(ROOT / "funcgrad").rglob("*.py")])

# Each file of the engine may import what stands before it, and what ALSO names.
ORDER = ["errors", "_jax", "shards", "layouts", "arguments", "graph", "rules", "living", "interpreter", "selecting"]
TRANSFORMS = {"gradient", "batching", "compilation"}
ALSO = {
    "graph": {"listing", "evaluation", "description", "dot"},
    "listing": {"graph"},
    "description": {"listing", "boxes", "residuals", "costs"},
    "dot": {"description"},
    "gradient": {"residuals", "scopes", "loops", "budgets", "jacobians", "refusals"},
    "budgets": {"costs", "loops"},
    "jacobians": {"chunks"},
    "batching": {"chunks"},
    "chunks": {"costs"},
    "patterns": {"matching"},
    "probes": {"frames"},
    "compilation": {"retraces"},
    "kernels": {"costs"},
    "costs": {"loops"},
    "faults": {"loops"},
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions; relative ones start with dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" if node.module else base + alias.name for alias in node.names} | {base}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_jax_is_reached_through_one_door(path):
    if path == ENGINE / "_jax.py":
        return
    private = {m for m in imports(path) if m.startswith(("jax._src", "jaxlib", "jax.interpreters", "jax.extend"))}
    assert not private


@pytest.mark.parametrize("path", sorted(ENGINE.glob("*/[!_]*.py")), ids=lambda p: f"{p.parent.stem}/{p.stem}")
def test_folders_of_the_engine_import_to_the_left(path):
    outside = {m.lstrip(".").split(".")[0] for m in imports(path) if m.startswith("..")} - {""}
    assert not any(m.startswith(("...", "funcgrad")) for m in imports(path))
    assert outside <= set(ORDER) | ALSO.get(path.parent.stem, set())


@pytest.mark.parametrize("path", sorted(ENGINE.glob("[!_]*.py")), ids=lambda p: p.stem)
def test_the_engine_imports_to_the_left(path):
    names = {m.lstrip(".").split(".")[0] for m in imports(path) if m.startswith(".")} - {""}
    assert not any(m.startswith(("..", "funcgrad")) for m in imports(path))
    allowed = set(ORDER[: ORDER.index(path.stem)]) if path.stem in ORDER else set(ORDER)
    assert names <= allowed | ALSO.get(path.stem, set())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 450


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent
    ).stdout


def test_importing_leaves_no_top_level_transforms():
    assert run("import sys, funcgrad; print('transforms' in sys.modules)").strip() == "False"


def test_importing_loads_nothing_heavy():
    heavy = {"optax", "flax", "equinox", "rich", "sklearn", "matplotlib", "orbax", "torch"}
    loaded = run("import sys, jax; before = set(sys.modules); import funcgrad; print(*set(sys.modules) - before)")
    assert not {name.split(".")[0] for name in loaded.split()} & heavy


def test_importing_is_quick(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # it is compiled once, not at every import
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = """
import time
start = time.process_time()
import jax
between = time.process_time()
import funcgrad
print((time.process_time() - between) / (between - start))
"""
    # 60 ms where jax takes 514: both in one process, since machines and their moods differ. The least: what else runs only adds.
    assert min(float(run(code)) for _ in range(5)) < 0.060 / 0.514
