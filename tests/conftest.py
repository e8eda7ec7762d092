"""What every test runs under: four host devices, strict dtype promotion, and warnings that are errors (pyproject.toml).

The tests run on the CPU unless the caller names platforms: `JAX_PLATFORMS=cuda,cpu pytest` runs them, and those marked
`gpu`, on a GPU, with the four host devices beside it.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # a test must not depend on what ran before it

# pytest puts this folder on the path, and its subfolders are named after the packages that they test. With this folder
# off the path, `import funcgrad` finds the package and not the folder of its tests.
here = str(Path(__file__).parent)
elsewhere = [entry for entry in sys.path if entry != here]
sys.path[:], entries = elsewhere, list(sys.path)
importlib.import_module("funcgrad")
sys.path[:] = entries


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "standard_promotion: calls libraries that mix dtypes freely")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU: the default backend is {jax.default_backend()!r}; try JAX_PLATFORMS=cuda,cpu")


@pytest.fixture(autouse=True)
def promotion(request):
    """Strict, or JAX's default where the test is marked `standard_promotion`."""
    rule = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(rule):
        yield
