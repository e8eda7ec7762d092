"""What every test runs under: four host devices, strict dtype promotion, and warnings that are errors (pyproject.toml).

The tests run on the CPU unless the caller names platforms: `JAX_PLATFORMS=cuda,cpu pytest` runs them, and those marked
`gpu`, on a GPU, with the four host devices beside it.

A test marked `sample(share, cover)` has many cases, of which a run of the default tier takes a share. The commit selects them, so
that each commit tests others: the header of a run names the sample, `--sample=NAME` repeats it, `--all` takes all cases. The
cases outside of the sample belong to the tier `slow`.

On the CPU, XLA compiles with LLVM's optimizations off, which takes a third less time. The HLO and its temporaries are the same,
only the machine code is slower. Tests that are slow, and those marked `optimized`, run the optimized machine code.
"""

from __future__ import annotations

import collections
import gc
import itertools
import math
import os
import subprocess
import zlib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
compiles = {"optimized": True}  # the present setting
jax.config.update("jax_enable_compilation_cache", False)  # a test must not depend on what ran before it


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run all cases of sampled tests")
    parser.addoption("--all-harnesses", action="store_true", help="compare on all of JAX's harnesses, not on a sample")
    parser.addoption("--sample", metavar="NAME", help="the sample of cases to run: the commit by default")


def pytest_configure(config):
    config.option.sample = config.option.sample or commit()  # xdist gives its workers the options of the main process


def commit() -> str:
    """The hash of the commit that is tested, or a fixed word where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no-commit"


def pytest_report_header(config):
    cases = "all cases" if config.option.all else f"--sample={config.option.sample}"
    return f"sampled tests: {cases}"


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config, items):
    """Marks the cases outside of the sample as slow."""
    if config.option.all:
        return
    tests = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("rest"):
            item.add_marker("slow")
        elif item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        sample = sample_of(cases, config.option.sample, *cases[0].get_closest_marker("sample").args)
        for item in set(cases) - set(sample):
            item.add_marker("slow")


def sample_of(items: list[pytest.Item], name: str, share: float, cover: tuple[str, ...] = ()) -> list[pytest.Item]:
    """A share of the cases of a test, and as many more as show each value of the parameters in `cover` at least once."""
    by_hash = sorted(items, key=lambda item: zlib.crc32(f"{name} {item.nodeid}".encode()))
    count = math.ceil(share * len(items))
    sample, values = [], set()
    for k, item in enumerate(by_hash):
        covered = {(parameter, id(item.callspec.params[parameter])) for parameter in cover}
        if k < count or covered - values:
            sample.append(item)
            values |= covered
    return sample


def pytest_collection_finish():
    """The garbage collector does not go through what the tests themselves are: it would at each collection."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """What tests/test_harnesses.py compared, in all processes together."""
    counts = collections.Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if getattr(report, "when", None) == "call":
            for case, outcome, n in dict(report.user_properties).get("programs", ()):
                counts[case, outcome] += n
    if terminalreporter.stats.get("failed"):
        terminalreporter.line(f"the same cases again: pytest --sample={terminalreporter.config.option.sample}")
    if counts:
        terminalreporter.section("programs compared with JAX's own", "-")
    for case, outcomes in itertools.groupby(sorted(counts), lambda key: key[0]):
        terminalreporter.line(f"{case}: " + ", ".join(f"{counts[key]} {key[1]}" for key in outcomes))


def pytest_runtest_setup(item):
    is_optimized = any(map(item.get_closest_marker, ("optimized", "slow"))) or os.environ["JAX_PLATFORMS"] != "cpu"
    if is_optimized != compiles["optimized"]:  # JAX's caches do not tell the two apart
        compiles["optimized"] = is_optimized
        jax.config.update("jax_disable_most_optimizations", not is_optimized)
        jax.clear_caches()
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU: the default backend is {jax.default_backend()!r}; try JAX_PLATFORMS=cuda,cpu")


@pytest.fixture(autouse=True)
def promotion(request):
    """Strict, or JAX's default where the test is marked `standard_promotion`."""
    rule = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(rule):
        yield
