"""Every transform on the uses of primitives by which JAX tests itself: JAX's own programs, and its own refusals.

JAX's wheel ships a list of more than 7,000 harnesses, each a function and its arguments. The sample of a run (tests/conftest.py)
selects half of the primitives, and one harness of each. `pytest -n 2 --all --all-harnesses tests/test_harnesses.py` takes all.
The end of a run says how many programs were compared and how they were the same.
"""

from __future__ import annotations

import collections
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import funcgrad as fg

from . import checks
from .corpus import Program

with jax.enable_x64(True):  # the list holds 64-bit types only if they are on while it is made
    HARNESSES = pytest.importorskip(
        "jax._src.internal_test_util.test_harnesses",
        reason="this JAX lacks its list of harnesses, or what the list imports",
        exc_type=ImportError,
    ).all_harnesses

PART = 40  # harnesses in one test
REFUSALS = (NotImplementedError, TypeError, ValueError)  # what JAX raises; another error would be one of these tests

TRANSFORMS = [t for t in checks.TRANSFORMS if t.name in ("call", "vjp", "jvp")]
TRANSFORMS += [checks.Transform("vmap", lambda m, f, p: m.vmap(f, axis_size=2), batched=True)]  # of all arguments


def needs_x64(harness: Any) -> bool:
    """Whether a 64-bit type is the harness' own dtype, or another that its name tells. All others run without, as users do."""
    return bool(re.search(r"int64|float64|complex128", f"{jnp.dtype(harness.dtype)} {harness}"))


def pytest_generate_tests(metafunc):
    """One test per primitive, or per `PART` harnesses of it."""
    if "harnesses" not in metafunc.fixturenames:
        return
    listed = sorted(HARNESSES, key=lambda h: (h.group_name, str(h)))  # JAX lists them in the order of sets
    for_primitive = [list(group) for _, group in itertools.groupby(listed, lambda h: h.group_name)]
    if not metafunc.config.option.all_harnesses:
        by_hash = lambda h: zlib.crc32(f"{metafunc.config.option.sample} {h}".encode())
        for_primitive = [[min(group, key=by_hash)] for group in for_primitive]
    parts = [group[k : k + PART] for group in for_primitive for k in range(0, len(group), PART)]
    metafunc.parametrize("harnesses", parts, ids=lambda part: part[0].group_name)


@pytest.mark.sample(1 / 2)
@pytest.mark.standard_promotion
def test_same_programs(harnesses, record_property):
    counts, failures = collections.Counter(), []
    for harness in harnesses:
        with jax.enable_x64(needs_x64(harness)):
            for case, outcome in compared(harness):
                if isinstance(outcome, Exception):
                    failures.append(f"{harness}, {case}: {outcome!r:.1000}")
                counts[case, "different" if isinstance(outcome, Exception) else outcome] += 1
    record_property("programs", [(*key, n) for key, n in counts.items()])  # for the summary, in conftest.py
    assert not failures, "\n".join([f"{len(failures)} different:", *failures])


def compared(harness: Any) -> Iterator[tuple[str, str | Exception]]:
    """Each form of each transform of a harness, and in which way it is JAX's own, or the error that says how it is not."""
    f, args = harness.dyn_fun, tuple(harness.dyn_args_maker(np.random.RandomState(0)))
    p, graph = Program(str(harness), f, args), attempt(fg.trace, f, *args)
    forms = {
        "function": (fg, f),
        "Graph": (fg, graph),
        "rewritten Graph": (fg, attempt(checks.identity_rewrite, graph)),
        "live function": (jax, checks.identity_live(f)),
    }
    for transform in TRANSFORMS:
        inputs = jax.tree.map(lambda x: np.stack([x, x]), args) if transform.batched else args
        program = transform.apply(jax, f, p)
        want = attempt(checks._lower, program, inputs)
        for form, (m, g) in forms.items():
            transformed = attempt(transform.apply, m, g, p)
            if transformed is not program:  # as the call of a function is
                got = attempt(checks._lower, transformed, inputs)
                yield f"{transform} of a {form}", same(got, want, as_programs, inputs, "Graph" in form)
        rewritten = attempt(checks.identity_rewrite, attempt(fg.trace, program, *inputs))
        outcome = same(rewritten, attempt(traced_twice, program, inputs), as_graphs, want, inputs)
        yield f"rewritten Graph of a {transform}", outcome


def traced_twice(f: Callable, args: tuple) -> SimpleNamespace:
    """JAX's own graph of `f`, as JAX itself evaluates it again: as in a rewritten one, constants stand in order of use."""
    jaxpr = jax.make_jaxpr(f)(*args)
    return SimpleNamespace(jaxpr=jax.make_jaxpr(jax.extend.core.jaxpr_as_fun(jaxpr))(*jax.tree.leaves(args)))


def same(got: Any, want: Any, check: Callable[..., str], *args: Any) -> str | Exception:
    """What `check` says of two results; of errors, that both are, and of one type."""
    try:
        if isinstance(want, Exception):
            assert isinstance(want, REFUSALS), f"no refusal: {want!r:.300}"
            assert isinstance(got, Exception), f"JAX refuses it: {want!r:.300}"
            checks.assert_same_error(got, want)
            return "both refuse"
        return got if isinstance(got, Exception) else check(got, want, *args)
    except Exception as e:
        return e


def as_programs(got: tuple, want: tuple, inputs: tuple, is_graph: bool) -> str:
    checks._assert_same_lowered(got, want, inputs, is_graph)
    return "same text" if checks._body(got[1]) == checks._body(want[1]) else "same values"


def as_graphs(got: fg.Graph, want: Any, lowered: tuple, inputs: tuple) -> str:
    try:
        checks.assert_same_graph(got, want)
    except AssertionError:  # JAX names an unused output after some of its passes, and after others does not
        return as_programs(checks._lower(got, inputs), lowered, inputs, is_graph=True)
    return "same equations"


def attempt(f: Callable, *args: Any) -> Any:
    """What a call returns, or the error that it raises, or that the making of an argument raised."""
    try:
        return next((x for x in args if isinstance(x, Exception)), None) or f(*args)
    except Exception as e:
        return e
