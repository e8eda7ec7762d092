"""Every example in a docstring, in the README and in docs/ runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import funcgrad

ROOT = Path(__file__).parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    """All modules of the package, and of the engine, which a checkout has beside it."""
    found = ["funcgrad", "funcgrad.transforms"]
    for package in (funcgrad, funcgrad.transforms):
        found += [info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return sorted({name for name in found if not name.endswith("__main__")})


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert not failed


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_pages(page):
    failed, attempted = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert attempted > 10
    assert not failed
