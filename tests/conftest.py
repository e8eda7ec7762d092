"""What every test runs under: four host devices, strict dtype promotion, and warnings that are errors (pyproject.toml).

The tests run on the CPU unless the caller names platforms: `JAX_PLATFORMS=cuda,cpu pytest` runs them, and those marked
`gpu`, on a GPU, with the four host devices beside it.
"""

from __future__ import annotations

import collections
import gc
import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # a test must not depend on what ran before it


def pytest_addoption(parser):
    parser.addoption("--all-harnesses", action="store_true", help="compare on all of JAX's harnesses, not on a sample")


def pytest_terminal_summary(terminalreporter):
    """What tests/test_harnesses.py compared, in all processes together."""
    counts = collections.Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if getattr(report, "when", None) == "call":
            for case, outcome, n in dict(report.user_properties).get("programs", ()):
                counts[case, outcome] += n
    if counts:
        terminalreporter.section("programs compared with JAX's own", "-")
    for case, outcomes in itertools.groupby(sorted(counts), lambda key: key[0]):
        terminalreporter.line(f"{case}: " + ", ".join(f"{counts[key]} {key[1]}" for key in outcomes))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU: the default backend is {jax.default_backend()!r}; try JAX_PLATFORMS=cuda,cpu")


@pytest.fixture(autouse=True)
def promotion(request):
    """Strict, or JAX's default where the test is marked `standard_promotion`."""
    rule = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(rule):
        yield


@pytest.fixture
def fresh_heap():
    """For a test that takes the time: the garbage collector does not go through what other tests have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
