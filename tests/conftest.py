"""What every test runs under: four host devices, strict dtype promotion, and warnings that are errors (pyproject.toml).

The tests run on the CPU unless the caller names platforms: `JAX_PLATFORMS=cuda,cpu pytest` runs them, and those marked
`gpu`, on a GPU, with the four host devices beside it.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # a test must not depend on what ran before it


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU: the default backend is {jax.default_backend()!r}; try JAX_PLATFORMS=cuda,cpu")


@pytest.fixture(autouse=True)
def promotion(request):
    """Strict, or JAX's default where the test is marked `standard_promotion`."""
    rule = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(rule):
        yield
