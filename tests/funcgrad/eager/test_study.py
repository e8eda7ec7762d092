"""`study`: what it says of functions of which everything is known."""

from __future__ import annotations

import functools
import io
import itertools
import json
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax import lax

import funcgrad as fg

from ...checks import counted_compilations, raised_by

TABLE = jnp.arange(1000.0)
X = jnp.linspace(0.1, 1, 12).reshape(3, 4)


def unrolled(x, n, mode="sine"):
    print("runs with", mode)
    for k in range(3):
        x = jnp.sin(x) + TABLE[k]
    if mode == "sine":
        x = x * 2
    elif mode == "other":
        x = x * 3
    else:
        x = x / 2
    return jnp.sum(x * n)


def branching(x):
    y = jnp.sum(x)
    if y > 0:
        return jnp.sin(x)
    return x


@pytest.fixture(scope="module")
def studied():
    others = [(X, 2.0, "sine"), (X[:2], 2.0, "sine"), (X, jnp.float32(2), "sine"), (X, 2.0, "none")]
    return fg.study(unrolled, X, 2.0, "sine", static_argnums=2, others=others)


def test_operations_equations_and_kernels(studied):
    graph = fg.trace(unrolled, X, 2.0, "sine", static_argnums=2)
    assert studied.traced_equations == len(graph.eqns) == len(studied.graph.eqns)
    assert studied.eager_operations == len(studied.tape)
    assert [str(n.primitive) for n in studied.tape.nodes].count("sin") == 3
    assert len(studied.kernels.kernels) < studied.traced_equations
    assert studied.refusal is None is studied.difference


def test_what_python_did(studied, capsys):
    assert capsys.readouterr().out == ""
    assert studied.noticed.printed == ["runs with sine"]
    (loop,) = studied.noticed.loops()
    assert (loop.head, loop.times) == ("for k in range(3)", 3)
    outer, inner = [*studied.noticed.branches(), None][:2]
    assert (outer.test, outer.taken, outer.not_taken) == ("mode == 'sine'", ("x = x * 2",), ("",))
    assert inner is None
    assert "test_study.py" in outer.line
    other = fg.study(unrolled, X, 2.0, "none", static_argnums=2)
    outer, inner = other.noticed.branches()
    assert (outer.taken, outer.not_taken) == (("",), ("x = x * 2",))
    assert (inner.test, inner.taken, inner.not_taken) == ("mode == 'other'", ("x = x / 2",), ("x = x * 3",))


def test_what_was_burned_in_and_what_is_traced_again(studied):
    (constant,) = studied.constants
    assert (constant.name, constant.type, constant.bytes) == ("TABLE", "f32[1000]", 4000)
    assert studied.fixed == (
        "mode = 'sine' is static: each other value is traced again",
        "x is f32[3,4]: another shape or dtype is traced again",
        "n is a Python number, f32[] of weak type: an array of float32 is traced again",
    )
    text = "\n".join(studied.retraces)
    assert len(studied.retraces) == 4
    assert "x  shape (3, 4) -> (2, 4)" in text
    assert "n  weak type True -> False" in text
    assert "mode  static 'sine' -> 'none'" in text


def test_closed_over_arrays_have_names():
    w = {"a": jnp.ones(3)}
    (constant,) = fg.study(lambda x: x * w["a"], jnp.ones(3)).constants
    assert constant.name == "w['a']"


def test_memory():
    big = jnp.ones(1000)
    s = fg.study(lambda x: jnp.sum(lax.exp(lax.sin(x))), big)
    assert s.eager_peak_bytes == 2 * big.nbytes
    assert s.kernels.memory.temp_bytes < s.eager_peak_bytes


def test_times():
    times = fg.study(lambda x: jnp.sin(jnp.sin(x)), X).times
    assert min(times.first_s, times.compiled_s, times.eager_s) > 0
    Times = type(times)
    assert Times(1.0, 10.0, 0.1).pays_after == 11
    assert Times(1.0, 10.0, 2.0).pays_after is None
    assert Times(1.0, None, None).pays_after is None


@pytest.mark.parametrize(
    ("f", "error", "asked", "value", "instead"),
    [
        (branching, "TracerBoolConversionError", "a truth value", "True", "jax.lax.cond"),
        (lambda x: x * float(x.sum()), "ConcretizationTypeError", "a number", "6.6", "static_argnames"),
        (lambda x: x * np.sin(x), "TracerArrayConversionError", "a NumPy array", "", "jax.numpy"),
        (lambda x: x[x > 0.5], "NonConcreteBooleanIndexError", "as many elements", "", "jnp.where"),
        (lambda x: [1, 2, 3][x.astype(int).sum()] * x, "TracerIntegerConversionError", "an index", "1", "jnp.take"),
    ],
    ids=["branch", "float", "numpy", "mask", "index"],
)
@pytest.mark.standard_promotion
def test_what_cannot_be_traced_is_explained(f, error, asked, value, instead):
    s = fg.study(f, X)
    assert s.refusal.error == error
    assert "test_study.py" in s.refusal.line
    assert s.refusal.asked.startswith(asked)
    assert value in s.refusal.value
    assert instead in s.refusal.instead
    assert s.graph is s.kernels is s.traced_equations is None
    assert s.eager_operations > 0
    assert s.refusal.source in str(s)


def test_other_errors_are_the_users():
    def failing(x):
        raise KeyError("mine")

    assert isinstance(raised_by(lambda: fg.study(failing, X)), KeyError)
    assert isinstance(raised_by(lambda: fg.study(3)), fg.ArgumentError)


def test_values_that_differ():
    runs = []

    def counting(x):
        runs.append(None)
        return x * len(runs)

    s = fg.study(counting, X)
    assert s.difference.gap > 0.5
    assert s.difference.line == ""
    assert "Python did something else while it was traced" in str(s)


def test_values_that_differ_in_one_operation():
    count = itertools.count(1)

    def f(x):
        y = jnp.sin(x)
        with jax.named_scope("host"):
            y = jax.pure_callback(lambda y: np.float32(next(count)) * y, y, y)
        return y + 1

    d = fg.study(f, X).difference
    assert (d.primitive, d.scope) == ("pure_callback", "host")
    assert "test_study.py" in d.line


def test_reports(studied, tmp_path):
    json.dumps(studied.dict())
    text = str(studied)
    for part in ("eager", "compiling pays", "burned in", "made for", "kernels", "runs with sine"):
        assert part in text
    path = studied.save(tmp_path / "study.html")
    page = path.read_text()
    assert page.startswith("<!doctype html>")
    assert "for k in range(3)" in page
    assert "http" not in page.replace("http-equiv", "")
    assert repr(studied).startswith("Study(unrolled: ")
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(studied)
    assert "[3,4]" in console.export_text()


def test_comparisons(studied, tmp_path):
    both = fg.compare(studied, fg.study(branching, X))
    assert [row["function"] for row in both.rows] == ["unrolled", "branching"]
    assert [row["tracing"] for row in both.rows] == ["ok", "refused"]
    assert len(str(both).splitlines()) == 3
    json.dumps(both.dict())
    assert "branching" in both.save(tmp_path / "both.html").read_text()
    assert repr(both) == "Comparison(unrolled, branching)"


# Functions as people have them


def test_loops_with_contexts_calls_and_loops_inside():
    def f(x):
        for _ in range(3):
            for _ in range(2):
                x = x * 2
        for _ in range(2):
            with jax.named_scope("a"):
                x = jnp.sin(x)
        for _ in range(3):
            x = jnp.where(
                x > 0,
                jnp.sin(x),
                x,
            )
        k = 0
        while k < 4:
            k += 1
        return x

    assert [loop.times for loop in fg.study(f, X).noticed.loops()] == [3, 6, 2, 3, 4]


def test_branches_that_are_taken_now_and_then():
    def f(x):
        for k in range(3):
            if k == 1:
                x = x * 2
        if x.ndim == 7:
            x = x * 3
        return x

    first, second = fg.study(f, X).noticed.branches()
    assert (first.taken, first.not_taken) == (("x = x * 2", ""), ())
    assert (second.taken, second.not_taken) == (("",), ("x = x * 3",))


def test_jitted_and_donating_functions():
    big = jnp.ones((50, 50))

    @jax.jit
    def inner(x):
        print("inner")
        return x @ big

    s = fg.study(lambda x: inner(x) + 1, jnp.ones((3, 50)))
    assert s.noticed.printed == ["inner"]
    assert [c.bytes for c in s.constants] == [big.nbytes]
    donating, x = jax.jit(lambda x: jnp.sin(x) * 2, donate_argnums=0), jnp.ones(1000)
    s = fg.study(donating, x)
    assert not x.is_deleted()
    assert s.difference is None


@pytest.mark.parametrize("jit", [jax.jit, fg.jit])
def test_a_jitted_function_that_was_called_before_is_traced_anew(jit):
    f = jit(unrolled, static_argnames="mode")
    f(X, 2.0, "none")
    f(X, 2.0, "sine")
    for _ in range(2):
        with counted_compilations() as compilations:
            s = fg.study(f, X, 2.0, "sine")
        assert compilations
        assert len(s.retraces) == 1
        assert "mode = 'sine' is static: each other value is traced again" in s.fixed
    assert "mode = 'none' is static" in str(fg.study(f, X, 2.0, mode="none"))


def test_a_jitted_gradient_is_studied_as_it_is():
    s = fg.study(jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(x)))), X)
    assert "cos" in [str(eqn.primitive) for _, eqn in fg.walk(s.graph)]
    assert s.difference is None
    assert "cos" in [str(node.primitive) for node in s.tape.nodes]


def test_names_of_what_is_closed_over():
    w, module = jnp.ones(3), types.SimpleNamespace(w=jnp.ones(3))

    class Model:
        def __init__(self):
            self.w = jnp.ones(3)

        def apply(self, x):
            return x * self.w

        def __call__(self, x):
            return x * self.w

    table = np.arange(3.0, dtype=np.float32)
    cases = {
        "self.w": Model().apply,
        "w": Model(),
        "argument 0": functools.partial(lambda w, x: x * w, w),
        "module.w": lambda x: x * module.w,
        "table": lambda x: x * table,
    }
    for name, f in cases.items():
        assert [c.name for c in fg.study(f, jnp.ones(3)).constants] == [name]


def test_values_of_all_kinds_are_compared():
    assert fg.study(lambda x: x > np.random.rand(1000), jnp.linspace(0, 1, 1000)).difference is not None
    assert fg.study(lambda x: jax.random.key(np.random.randint(10**6)), X).difference is not None
    assert fg.study(lambda x: (x > 0.5, jax.random.key(0)), X).difference is None


@pytest.mark.parametrize(
    "f",
    [
        lambda x, n: x[:n],
        lambda x, n: jnp.zeros((n,)) + jnp.sum(x),
        lambda x, n: x.reshape(n, -1),
        lambda x, n: jnp.asarray(float(f"{x.sum():.2f}")),
        lambda x, n: {"sine": jnp.sin}["sine" if n > 0 else "other"](x),
    ],
)
def test_whatever_fails_only_when_it_is_traced_is_explained(f):
    s = fg.study(f, X, 2)
    assert s.refusal is not None
    assert s.refusal.instead
    assert s.refusal.error in str(s)


def test_a_string_among_the_arguments_is_explained():
    s = fg.study(lambda x, mode: jnp.sin(x) if mode == "sine" else x, X, "sine")
    assert s.refusal.error == "ArgumentError"
    assert "static" in str(s)


def test_two_studies_in_two_threads(capsys):
    is_running, is_second_started = threading.Event(), threading.Event()

    def waiting(x):
        print("mine")
        is_running.set()
        is_second_started.wait()
        return x * 2

    before = sys.stdout
    threads = [threading.Thread(target=fg.study, args=(waiting, jnp.ones(3))) for _ in range(2)]
    threads[0].start()
    is_running.wait()
    threads[1].start()
    is_second_started.set()
    for thread in threads:
        thread.join()
    assert sys.stdout is before
    print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_wrong_uses():
    assert isinstance(raised_by(lambda: fg.study(jnp.sin, X, others=[X])), fg.OptionError)
    assert isinstance(raised_by(lambda: fg.compare()), fg.ArgumentError)
    assert isinstance(raised_by(lambda: fg.compare(jnp.sin)), fg.ArgumentError)
