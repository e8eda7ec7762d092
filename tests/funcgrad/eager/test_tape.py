"""The tape: what ran, with its values, and its gradient; compared with what JAX computes."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import funcgrad as fg

from ... import test_other_libraries as libraries
from ...checks import assert_close_values, assert_near, assert_same_values, inexact_leaves, options, raised_by, summed
from ...corpus import CORPUS
from ...sampling import sampled

X = jnp.linspace(0.2, 1.4, 3)
W = jnp.linspace(-0.5, 0.8, 9).reshape(3, 3)
DIFFERENTIABLE = [p for p in CORPUS if "grad" not in p.lacks and p.name not in ("references", "references_in_loops")]


def arrays(tree):
    """Python numbers as arrays, which a tape knows again."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, tree)


def recorded(f, *args):
    with fg.tape() as t:
        out = f(*args)
    return out, t


def names(t):
    return [str(node.primitive) for node in t.nodes]


# What is recorded


def test_values_are_what_they_are_without_a_tape():
    with fg.tape() as t:
        y = lax.mul(lax.sin(X), X)
        assert type(y) is type(X)
        assert not isinstance(y, jax.core.Tracer)
    assert names(t) == ["sin", "mul"]
    sine, product = t.nodes
    assert product.outputs[0] is y
    assert product.inputs[0] is sine.outputs[0]
    assert product.inputs[1] is X
    assert product.parents == ((0, 0), None)
    assert sine.elapsed_s > 0
    np.testing.assert_array_equal(y, np.asarray(lax.sin(X) * X))
    lax.cos(X)
    assert len(t) == 2


def test_lines_and_scopes():
    with fg.tape() as t, jax.named_scope("outer"):
        lax.sin(X)
        with jax.named_scope("inner"):
            jnp.where(X > 0, X, 2.0)
    assert [node.scope for node in t.nodes] == ["outer", *["outer/inner"] * (len(t) - 1)]
    assert all("test_tape.py" in node.line for node in t.nodes)
    lines = [int(node.line.split(":")[1].split()[0]) for node in t.nodes]
    assert lines == [lines[0]] + [lines[0] + 2] * (len(t) - 1)


def test_a_jitted_function_runs_operation_by_operation():
    @jax.jit
    def f(x):
        with jax.named_scope("scope"):
            return jnp.tanh(x @ W) + 1

    out, t = recorded(f, X)
    assert names(t) == ["dot_general", "tanh", "add"]
    assert {node.scope for node in t.nodes} == {"scope"}
    assert_close_values(out, f(X))


def test_a_jit_that_places_its_values_is_one_operation():
    devices = jax.devices()
    f = jax.jit(lambda x: jnp.sin(x) * 2, out_shardings=jax.sharding.SingleDeviceSharding(devices[1]))
    out, t = recorded(f, X)
    assert names(t) == ["jit"]
    assert out.devices() == {devices[1]}


def test_control_flow_of_lax_is_one_operation():
    def f(x):
        x = lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x)
        x = lax.cond(x.sum() > 0, jnp.cos, jnp.sin, x)
        return lax.scan(lambda c, _: (c * 2, c), x, None, length=2)

    out, t = recorded(f, X)
    assert [n for n in names(t) if n in ("while", "cond", "scan")] == [
        "while" if "while" in names(t) else "scan",
        "cond",
        "scan",
    ]
    assert_close_values(out, f(X))


def test_python_control_flow_as_it_went():
    def collatz(x):
        steps = 0
        while int(x) != 1:
            x = x // 2 if int(x) % 2 == 0 else 3 * x + 1
            steps += 1
        return steps

    steps, t = recorded(collatz, jnp.asarray(6))
    assert steps == 8
    assert names(t).count("mul") == 2


def test_numbers_have_no_parents_and_arrays_are_found_by_identity():
    with fg.tape() as t:
        y = lax.mul(lax.full((), 2.0), 2.0)
        lax.add(y, y)
    assert t.nodes[-1].parents == ((t.nodes[-2].index, 0),) * 2
    assert t.nodes[-2].parents[1] is None


def test_transforms_inside_of_a_tape():
    out, t = recorded(jax.vmap(jax.grad(lambda x: jnp.sin(x) ** 2)), X)
    assert "cos" in names(t)
    assert_close_values(out, jax.vmap(jax.grad(lambda x: jnp.sin(x) ** 2))(X))


def test_a_tape_under_a_tape_and_under_jit():
    with fg.tape() as outer:
        lax.sin(X)
        with fg.tape() as inner:
            lax.cos(X)
        lax.tan(X)
    assert names(outer) == ["sin", "cos", "tan"]
    assert names(inner) == ["cos"]

    @jax.jit
    def f(x):
        out, t = recorded(lambda x: jnp.sum(lax.sin(x) * x), x)
        return t.grad(out, x)

    assert_near(f(X), jax.grad(lambda x: jnp.sum(jnp.sin(x) * x))(X), 1e-6)


def test_the_tape_of_one_thread():
    with fg.tape() as t:
        thread = threading.Thread(target=lambda: lax.sin(X))
        thread.start()
        thread.join()
        lax.cos(X)
    assert names(t) == ["cos"]


def test_it_ends_with_an_exception():
    def failing():
        with fg.tape() as t:
            tapes.append(t)
            lax.sin(X)
            raise ZeroDivisionError

    tapes: list[fg.Tape] = []
    with pytest.raises(ZeroDivisionError):
        failing()
    (t,) = tapes
    lax.cos(X)
    assert names(t) == ["sin"]


def test_values_are_freed_with_the_tape():
    with fg.tape() as t:
        y = jnp.sin(X)
    alive = weakref.ref(y)
    del y
    assert alive() is not None
    del t
    gc.collect()
    assert alive() is None


def test_as_text():
    x = jnp.ones((2,))
    with fg.tape() as t:
        y = lax.mul(lax.sin(x), 2.0)
        lax.reduce_max(y, (0,))
    head, *rows = str(t).splitlines()
    assert head.startswith("Tape(3 operations, ")
    assert [row.split("  ")[1] for row in rows] == [
        "%0:f32[2] = sin f32[2]",
        "%1:f32[2] = mul %0 f32[]",
        "%2:f32[] = reduce_max %1",
    ]
    assert all("µs" in row and "test_tape.py" in row for row in rows)


# Its gradient


SAMPLE = (
    "associative_scan",
    "branches_in_loops",
    "checkpoint",
    "closed_over_constants",
    "complex_numbers",
    "custom_jvp_in_loops",
    "custom_nodes",
    "custom_vjp_in_loops",
    "dataclasses",
    "integer_inputs",
    "key_arrays",
    "optimization_barrier",
    "scalar",
    "scan_tree_carry",
    "shard_map_loops",
    "switch",
    "weak_types",
    "zero_size",
)


@pytest.mark.parametrize("p", sampled(DIFFERENTIABLE, SAMPLE))
def test_gradients_of_the_corpus(p):
    """Equal to JAX's, with respect to all arrays of floats among the arguments."""
    args = arrays(p.args)
    numbers = (p.diff,) if isinstance(p.diff, int) else p.diff
    loss = summed(p.f)
    want = jax.grad(loss, **options(p))(*args)
    out, t = recorded(loss, *args)
    wrt = inexact_leaves([args[k] for k in numbers])
    if t.makers.get(id(out)) is None:  # a number that nothing computed
        assert not any(jnp.any(x != 0) for x in inexact_leaves(want))
        return
    assert_near(out, loss(*args), 1e-5)
    got, want = t.grad(out, wrt), [x for x in inexact_leaves(want) if x.dtype != jax.dtypes.float0]
    for a, b in zip(got, want, strict=True):
        if b.size:
            assert_near(a, b, max(1e-4, 4 * float(jnp.finfo(b.dtype).eps)))  # compiled in other pieces


def test_branches_on_values():
    def f(x):
        for _ in range(3):
            x = x * x if float(x.sum()) < 3 else jnp.sin(x)
        return jnp.sum(x)

    for x in (X, 2 * X):
        out, t = recorded(f, x)
        taken = [n for n in names(t) if n in ("mul", "sin")]
        same = lambda x, taken=taken: jnp.sum(
            functools.reduce(lambda x, n: x * x if n == "mul" else jnp.sin(x), taken, x)
        )
        assert_near(t.grad(out, x), jax.grad(same)(x), 1e-6)


def test_loops_as_long_as_the_data():
    def length(words, w):
        state = jnp.zeros(3)
        for word in words:
            state = jnp.tanh(w @ state + word)
        return jnp.sum(state)

    for n in (1, 4):
        words = [X * k for k in range(n)]
        out, t = recorded(length, words, W)
        assert_near(t.grad(out, (words, W)), jax.grad(length, (0, 1))(words, W), 1e-6)


def test_gradients_may_be_taken_again_and_of_other_values():
    with fg.tape() as t:
        y = jnp.sin(X)
        a, b = jnp.sum(y * y), jnp.sum(jnp.exp(y))
    for _ in range(2):
        assert_near(t.grad(a, X), jax.grad(lambda x: jnp.sum(jnp.sin(x) ** 2))(X), 1e-6)
        assert_near(t.grad(b, y), jnp.exp(y), 1e-6)
        assert_near(t.grad(b, {"x": X, "other": W}), {"x": jnp.exp(y) * jnp.cos(X), "other": 0 * W}, 1e-6)
    assert_same_values(t.grad(a, a), jnp.float32(1))


def test_an_operation_that_returns_what_it_is_given():
    def f(x):
        return jnp.sum(lax.stop_gradient(x) * lax.optimization_barrier(x) * x)

    out, t = recorded(f, X)
    assert_near(t.grad(out, X), jax.grad(f)(X), 1e-6)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.sum(lax.stop_gradient(jnp.sqrt(x)) + x),
        lambda x: jnp.sum(jnp.floor(jnp.sqrt(x)) * x),
        lambda x: jnp.sum(jnp.sign(jnp.log(x)) * x),
        lambda x: jnp.sum((x - 1) ** 2) + lax.stop_gradient(jnp.linalg.norm(0 * x)),
        lambda x: jnp.sum(x * jax.pure_callback(np.cos, x, lax.stop_gradient(x))),
    ],
    ids=["stop_gradient", "floor", "sign", "norm", "callback"],
)
def test_derivatives_that_are_zero_meet_no_infinity(f):
    x = jnp.arange(3.0)
    out, t = recorded(f, x)
    assert_near(t.grad(out, x), jax.grad(f)(x), 1e-6)


def test_functions_with_derivatives_that_return_an_array_twice_or_another():
    @jax.custom_vjp
    def twice(a):
        c = jnp.sin(a)
        return c, c

    twice.defvjp(lambda a: (twice(a), None), lambda _, g: (10 * g[0] + 100 * g[1],))

    with fg.tape() as t:
        p, q = twice(X)
        a, b = jnp.sum(p), jnp.sum(q)
    assert_near(t.grad(a, X), jnp.full(3, 10.0), 1e-6)
    assert_near(t.grad(b, X), jnp.full(3, 100.0), 1e-6)
    w = jnp.ones(3)
    closed = jax.custom_jvp(lambda x: w)
    closed.defjvp(lambda primals, tangents: (w, tangents[0]))
    with fg.tape() as t:
        z = closed(X)
        y = jnp.sum(w * 2) + jnp.sum(z)
    assert_near(t.grad(y, (w, X)), (jnp.full(3, 2.0), jnp.ones(3)), 1e-6)


def test_rules_of_the_user_are_kept():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), 3.0), lambda r, ct: (r * ct,))

    @jax.custom_jvp
    def twice(x):
        return 2 * x

    twice.defjvp(lambda primals, tangents: (2 * primals[0], 5 * tangents[0]))
    for f in (rounded, twice, jax.jit(rounded), jax.jit(twice), jax.checkpoint(twice)):
        loss = lambda x, f=f: jnp.sum(f(x) * x)
        out, t = recorded(loss, X)
        assert_near(t.grad(out, X), jax.grad(loss)(X), 1e-6)


def test_loops_that_jax_cannot_reverse():
    def f(x):
        return jnp.sum(lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 1.5, x))

    out, t = recorded(f, X)
    assert_near(t.grad(out, X), fg.grad(f)(X), 1e-6)


def test_a_gradient_of_a_gradient_that_ran_on_the_tape():
    with fg.tape() as t:
        g = jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(x) * x**2))(X) ** 2)
    want = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(x) * x**2))(x) ** 2))(X)
    assert_near(t.grad(g, X), want, 1e-5)
    with fg.tape() as outer:
        with fg.tape() as inner:
            y = jnp.sum(jnp.sin(X) * X**2)
        s = jnp.sum(inner.grad(y, X) ** 2)
    assert_near(outer.grad(s, X), want, 1e-5)


@pytest.mark.parametrize(
    "make", [libraries.of_linen, libraries.of_nnx, libraries.of_equinox], ids=lambda m: m.__name__[3:]
)
@pytest.mark.standard_promotion
def test_models_of_other_libraries(make):
    f, params, state, batch = make()
    (loss, _), t = recorded(f, params, state, batch)
    got, want = t.grad(loss, params), jax.grad(lambda p: f(p, state, batch)[0])(params)
    assert_near(inexact_leaves(got), inexact_leaves(want), 1e-5)


@pytest.mark.standard_promotion
def test_a_training_step_with_optax():
    optimizer = optax.adam(0.1)
    loss = lambda w: jnp.sum((w @ X - 1) ** 2)

    def step(w, state):
        value, t = recorded(loss, w)
        updates, state = optimizer.update(t.grad(value, w), state, w)
        return optax.apply_updates(w, updates)

    updates, _ = optimizer.update(jax.grad(loss)(W), optimizer.init(W), W)
    got, t = recorded(step, W, optimizer.init(W))
    assert_near(got, optax.apply_updates(W, updates), 1e-5)
    assert "sqrt" in names(t)


@pytest.mark.standard_promotion
def test_variables_of_nnx_may_change():
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    before = norm.mean[...]
    with fg.tape() as t:
        norm(X[None] * jnp.ones((2, 3)))
    assert len(t) > 5
    assert not np.allclose(before, norm.mean[...])


# The run as a Graph


def test_a_run_as_a_graph():
    def f(w, x):
        with jax.named_scope("layer"):
            h = jax.nn.relu(w @ x)
        if float(h.sum()) > -1:
            h = jnp.sin(h) * 2
        return jnp.sum(h)

    out, t = recorded(f, W, X)
    graph = t.graph({"w": W, "x": X}, out)
    assert graph.paths == ("w", "x")
    assert_same_values(graph(w=W, x=X), out)
    assert_near(graph(w=2 * W, x=X), f(2 * W, X), 1e-6)
    assert_near(fg.grad(lambda w: graph(w=w, x=X))(W), t.grad(out, W), 1e-6)
    assert "layer" in str(graph)
    assert {line.split(":")[0].rpartition("/")[2] for line in graph.text(source=True).split() if ".py:" in line} == {
        "test_tape.py"
    }


def test_a_graph_of_all_that_was_used():
    with fg.tape() as t:
        y = W @ X
        z = jnp.sin(X) * 2.0
    graph = t.graph()
    assert graph.paths == ("x0", "x1")
    assert_same_values(graph(x0=W, x1=X), (y, z))


def test_a_graph_holds_no_python():
    with fg.tape() as t:
        x = X
        for _ in range(3):
            x = lax.sin(x)
    assert [str(eqn.primitive) for eqn in t.graph({"x": X}).eqns] == ["sin"] * 3


# What is refused


def test_errors():
    with fg.tape() as t:
        y, total, whole = jnp.sin(X), jnp.sum(X), jnp.sum(jnp.arange(3))
    messages = {
        lambda: t.grad(y, X): "tape.grad needs a float scalar of shape (), and got float32[3].",
        lambda: t.grad(whole, X): "tape.grad needs a float scalar of shape (), and got int32[].",
        lambda: t.grad(
            jnp.float32(2), X
        ): "tape.grad needs a scalar that was computed while the tape was open, and got another array.",
        lambda: t.grad(
            total, {"n": jnp.arange(3)}
        ): "tape.grad differentiates with respect to wrt['n'], which holds int32.",
        lambda: t.grad(total, [2.0]): "tape.grad differentiates with respect to wrt[0], which holds float.",
        lambda: t.grad(None, X): "tape.grad needs a float scalar of shape (), and got NoneType.",
        lambda: t.graph([X]): "tape.graph needs inputs by name, and got list.",
        lambda: t.graph(
            {"x": X}, 5 * X
        ): "tape.graph needs outputs that were computed while the tape was open, and got another array.",
        lambda: t.graph({"a": jnp.ones(3)}): "tape.graph found no use of inputs['a'] in this run.",
    }
    for call, message in messages.items():
        error = raised_by(call)
        assert str(error).splitlines()[0] == message
        assert isinstance(error, TypeError)


def test_references_are_refused():
    with fg.tape() as t:
        ref = jax.new_ref(X)
        ref[...] = ref[...] * X
        y = jnp.sum(ref[...])
    error = raised_by(lambda: t.grad(y, X))
    assert isinstance(error, fg.ArgumentError)
    assert "of a reference, which other operations may change" in str(error)
    assert "test_tape.py" in str(error)
