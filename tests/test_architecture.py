"""The arrows of ARCHITECTURE.md: who may import whom, one door to private JAX, and what importing funcgrad loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "transforms"
PRIVATE_JAX = ENGINE / "core" / "_jax.py"
FILES = sorted([*ENGINE.rglob("*.py"), *(ROOT / "funcgrad").rglob("*.py")])

# A folder may import those before it. Within a folder, as everywhere, files import each other without a circle.
FOLDERS = ["core", "while_loops", "rewriting", "cost", "batching", "remat", "autodiff", "compilation", "nan_origin"]


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
    if path == PRIVATE_JAX:
        return
    private = {m for m in imports(path) if m.startswith(("jax._src", "jaxlib", "jax.interpreters", "jax.extend"))}
    assert not private


def module_of(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("funcgrad", *parts) if parts[0] == "transforms" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def needs(path: Path) -> set[str]:
    """The modules of funcgrad that a file imports, also inside functions."""
    package = module_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    names = set()
    for name in imports(path):
        depth = len(name) - len(name.lstrip("."))
        above = package[: len(package) - depth + 1]
        names.add(".".join([*above, name[depth:]]).rstrip(".") if depth else name)
    return {name for name in names & MODULES.keys() if MODULES[name].name != "__init__.py"}


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("[!_]*.py")), ids=lambda p: f"{p.parent.stem}/{p.stem}")
def test_folders_of_the_engine_import_to_the_left(path):
    folder = path.relative_to(ENGINE).parts[0]
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    assert all(name.startswith("funcgrad.transforms.") and name.split(".")[2] in allowed for name in needs(path))


def test_no_files_import_each_other_in_a_circle():
    left = {name: needs(path) for name, path in MODULES.items() if path.name != "__init__.py"}
    while ready := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in ready}
    assert not left


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path):
    count = len(path.read_text().splitlines())
    assert count <= 400 or path == PRIVATE_JAX


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that importing funcgrad loads beyond those of jax."""
    code = "import sys, jax; before = set(sys.modules); import funcgrad; print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT.parent).stdout.split())


def test_importing_leaves_no_top_level_transforms(loaded):
    assert "transforms" not in loaded


def test_importing_loads_nothing_heavy(loaded):
    heavy = {"optax", "flax", "equinox", "rich", "sklearn", "matplotlib", "orbax", "torch"}
    assert not {name.partition(".")[0] for name in loaded} & heavy
