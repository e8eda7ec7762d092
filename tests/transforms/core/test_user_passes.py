"""`Pass`: passes written by a user, in live and Graph form, at every depth and under JAX's transforms."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

X = jnp.linspace(-1.0, 1.0, 4)
W = jnp.linspace(-0.5, 0.5, 16).reshape(4, 4)


class Count(fg.Pass):
    """Operations per scope, those of a scan as often as it runs."""

    def __init__(self):
        self.counts, self.times = Counter(), 1

    def equation(self, eqn, values):
        self.counts["/".join(self.scope()), eqn.primitive.name] += self.times
        return super().equation(eqn, values)

    def body(self, eqn, k):
        child = super().body(eqn, k)
        child.times = self.times * eqn.params.get("length", 1)
        return child


class Rounded(fg.Pass):
    """Products of operands rounded to bfloat16."""

    def equation(self, eqn, values):
        if eqn.primitive is lax.dot_general_p:
            values = list(map(rounded, values))
        return super().equation(eqn, values)


def rounded(x):
    return x.astype(jnp.bfloat16).astype(x.dtype)


class Interval(NamedTuple):
    low: jax.Array
    high: jax.Array


class Bounds(fg.Pass):
    """Intervals through products with constants and monotone operations."""

    def inlines(self, eqn, values):
        return True

    def equation(self, eqn, values):
        bind = super().equation
        if not any(isinstance(v, Interval) for v in values):
            return bind(eqn, values)
        if eqn.primitive is lax.dot_general_p:
            (low, high), w = values
            (centre,), (radius,) = bind(eqn, [(low + high) / 2, w]), bind(eqn, [(high - low) / 2, jnp.abs(w)])
            return [Interval(centre - radius, centre + radius)]
        ends = ([v[k] if isinstance(v, Interval) else v for v in values] for k in (0, 1))
        return [Interval(low, high) for low, high in zip(*(bind(eqn, e) for e in ends), strict=True)]


def model(dot):
    """A scan over layers, a branch, a checkpoint and a function with its own derivative; `dot` is its product."""

    @jax.custom_jvp
    def activation(x):
        return jnp.tanh(dot(x, W))

    activation.defjvp(lambda primals, tangents: (activation(*primals), dot(*tangents, W)))

    def f(x):
        with jax.named_scope("layers"):
            x, _ = lax.scan(
                lambda c, w: (jax.nn.relu(jax.named_scope("product")(dot)(c, w)), None), x, jnp.stack([W] * 3)
            )
        with jax.named_scope("head"):
            x = jax.checkpoint(activation)(x)
            return lax.cond(x[0] > 0, lambda y: dot(y, W), lambda y: y, x).sum()

    return f


MODEL, BY_HAND = model(jnp.dot), model(lambda x, w: jnp.dot(rounded(x), rounded(w)))
UNDER = {
    "call": lambda f: f(X),
    "jit": lambda f: jax.jit(f)(X),
    "grad": lambda f: jax.grad(f)(X),
    "jit of grad": lambda f: jax.jit(jax.grad(f))(X),
    "vmap": lambda f: jax.vmap(f)(jnp.stack([X, -X, X / 2])),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(jnp.stack([X, -X, X / 2])),
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
}


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("form", ["live", "rewrite"])
def test_a_pass_changes_operations_at_every_depth(form, under):
    f = fg.live(MODEL, Rounded()) if form == "live" else fg.verify(fg.rewrite(fg.trace(MODEL, X), Rounded()))
    got, want = UNDER[under](f), UNDER[under](BY_HAND)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


def test_what_a_pass_computes_is_seen_by_a_pass_outside():
    count = Count()
    jax.eval_shape(fg.live(fg.live(jnp.dot, Rounded()), count), X, W)
    assert [name for _, name in count.counts] == ["convert_element_type", "dot_general"]
    assert count.counts["", "convert_element_type"] == 4


@pytest.mark.parametrize("form", ["live", "interpret"])
def test_a_pass_knows_scopes_and_lengths_at_every_depth(form):
    count = Count()
    if form == "live":
        jax.eval_shape(fg.live(MODEL, count), X)
    else:
        jax.eval_shape(lambda x: fg.interpret(fg.trace(MODEL, X), count, x), X)
    products = {scope: n for (scope, name), n in count.counts.items() if name == "dot_general"}
    assert products == {"layers/product": 3, "head": 2}


@pytest.mark.parametrize("under", [lambda f: f, jax.jit, lambda f: lambda *ends: jax.vmap(f)(*(e[None] for e in ends))])
def test_values_of_a_pass_may_be_no_arrays(under):
    def mlp(x):
        return jax.nn.relu(jnp.tanh(x @ W + 0.1) @ W)

    graph = fg.trace(mlp, X)
    (bounds,) = under(lambda low, high: fg.interpret(graph, Bounds(), Interval(low, high)))(X - 0.1, X + 0.1)
    for corner in np.ndindex(2, 2, 2, 2):
        y = mlp(X + 0.2 * (jnp.array(corner, jnp.float32) - 0.5))
        assert jnp.all((bounds.low <= y + 1e-6) & (y - 1e-6 <= bounds.high))
    exact = Interval(*fg.interpret(graph, Bounds(), Interval(X, X))[0])
    np.testing.assert_allclose(exact.low, mlp(X), rtol=1e-6)


def test_arrays_leave_bodies():
    """The largest product of each body: stacked by a scan, zero from a branch that does not run."""

    class Largest(fg.Pass):
        def __init__(self):
            self.seen = []

        def equation(self, eqn, values):
            outputs = super().equation(eqn, values)
            self.seen += [outputs[0].max()] if eqn.primitive is lax.dot_general_p else []
            return outputs

        def body(self, eqn, k):
            return Largest()

        def leave(self, outputs):
            return outputs, self.seen

        def receive(self, eqn, values, k, extras):
            self.seen += extras

    def f(x):
        ys = lax.scan(lambda c, w: (c @ w, None), x, jnp.stack([W, 2 * W]))[0]
        return lax.cond(x[0] > 0, lambda y: y @ W, lambda y: y, ys)

    p = Largest()
    out = fg.interpret(fg.trace(f, X), p, X)
    np.testing.assert_array_equal(out[0], f(X))
    np.testing.assert_allclose(p.seen[0], jnp.array([(X @ W).max(), (X @ W @ (2 * W)).max()]), rtol=1e-6)
    assert p.seen[1] == 0


def test_what_is_no_pass_is_named():
    with pytest.raises(TypeError, match="live takes rules as a mapping, Rules or a Pass, and got list"):
        fg.live(MODEL, [Rounded()])


class Returning(fg.Pass):
    """Computes each sine by a function."""

    def __init__(self, f):
        self.f = f

    def equation(self, eqn, values):
        return self.f(*values) if eqn.primitive is lax.sin_p else super().equation(eqn, values)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: lax.cond(True, f, f, x)])
@pytest.mark.parametrize(
    ("f", "returned"),
    [
        (lambda x: jnp.cos(x), r"float32\[\]"),
        (lambda x: None, "None"),
        (lambda x: [x, x], r"\['float32\[\]', 'float32\[\]'\]"),
    ],
)
def test_a_pass_that_returns_no_list_of_all_outputs_is_named(f, returned, wrap):
    program = wrap(lambda x: lax.sin(x) * 2.0)
    for run in (
        lambda: fg.live(program, Returning(f))(jnp.float32(1)),
        lambda: fg.rewrite(fg.trace(program, jnp.float32(1)), Returning(f)),
    ):
        with pytest.raises(fg.GraphError, match=f"Returning.equation returned {returned} for 'sin'") as e:
            run()
        assert "test_user_passes.py" in str(e.value)


def test_an_output_of_another_type_is_named_in_a_graph():
    graph = fg.trace(lambda x: lax.sin(x), jnp.float32(1))
    with pytest.raises(fg.GraphError, match=r"returned \['float32\[3\]'\] for 'sin', which has float32\[\]"):
        fg.rewrite(graph, Returning(lambda x: [jnp.zeros(3)]))


def test_no_arrays_leave_where_there_is_no_room():
    """The predicate of a while and a function with its own derivative rule: the program stays, nothing is received."""

    class Sines(fg.Pass):
        def __init__(self, received):
            self.received, self.sines = received, []

        def equation(self, eqn, values):
            outputs = super().equation(eqn, values)
            self.sines += outputs if eqn.primitive is lax.sin_p else []
            return outputs

        def body(self, eqn, k):
            return Sines([])

        def leave(self, outputs):
            return outputs, self.sines

        def receive(self, eqn, values, k, extras):
            self.received += extras

    @jax.custom_jvp
    def ruled(x):
        return lax.sin(x)

    ruled.defjvp(lambda primals, tangents: (ruled(*primals), tangents[0]))

    def f(x):
        return ruled(lax.while_loop(lambda c: lax.sin(c) > 0.5, lambda c: c + 1.0, x))

    graph, p = fg.trace(f, 1.0), Sines([])
    for run in (fg.live(f, p), lambda x: fg.interpret(graph, p, x)[0]):
        np.testing.assert_allclose(run(1.0), f(1.0), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(run)(1.0), f(1.0), rtol=1e-6)
    assert not p.received
    for transform, x in ((jax.grad, 1.0), (jax.vmap, jnp.ones(2))):
        p = Sines([])
        np.testing.assert_allclose(transform(fg.live(ruled, p))(x), transform(ruled)(x), rtol=1e-6)
        assert not p.received


def test_only_calls_are_inlined():
    """A pass that inlines whatever it can keeps loops and branches."""

    class Inlining(fg.Pass):
        def inlines(self, eqn, values):
            return True

    def f(x):
        x = lax.scan(lambda c, _: (jax.jit(lambda y: y * 2)(c), None), x, None, length=3)[0]
        x = lax.while_loop(lambda c: c < 100, lambda c: c * 3, x)
        return lax.cond(x > 0, lambda y: jax.nn.relu(y) + 1, lambda y: y, x)

    graph = fg.trace(f, 1.0)
    assert fg.live(f, Inlining())(1.0) == f(1.0)
    assert fg.interpret(graph, Inlining(), 1.0)[0] == f(1.0)
    assert [path for path, _ in fg.walk(fg.rewrite(graph, Inlining())) if "jit" in "".join(path)] == []


def test_a_memo_keeps_one_body_per_scope():
    class Named(fg.Pass):
        """Multiplies sines by the length of the scope's name."""

        memo: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

        def equation(self, eqn, values):
            outputs = super().equation(eqn, values)
            return [len(self.scope()[0]) * outputs[0]] if eqn.primitive is lax.sin_p else outputs

    shared = jax.jit(lax.sin)

    def f(x):
        with jax.named_scope("a"):
            y = shared(x)
        with jax.named_scope("four"):
            return y, shared(x)

    for _ in range(2):
        np.testing.assert_allclose(fg.live(f, Named())(1.0), (np.sin(1), 4 * np.sin(1)), rtol=1e-6)


CONTEXTS = {
    "x64": lambda: jax.enable_x64(True),
    "leaks": jax.checking_leaks,
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": lambda: jax.disable_jit(True),
    "explicit mesh": lambda: jax.set_mesh(
        jax.make_mesh((2,), ("i",), (jax.sharding.AxisType.Explicit,), devices=HOSTS)
    ),
}
HOSTS = jax.devices("cpu")[:2]


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts(context):
    class Doubled(fg.Pass):
        def equation(self, eqn, values):
            outputs = super().equation(eqn, values)
            return [outputs[0] + outputs[0]] if eqn.primitive is lax.sin_p else outputs

    def program(sin):
        @jax.custom_jvp
        def ruled(x):
            return sin(x)

        ruled.defjvp(lambda primals, tangents: (ruled(*primals), tangents[0] * jnp.cos(primals[0])))

        def f(x):
            x, _ = lax.scan(lambda c, _: (sin(c) + 1.0, None), x, None, length=3)
            return jnp.sum(lax.cond(True, sin, lambda y: y, jax.checkpoint(ruled)(x)))

        return f

    f, want = program(lax.sin), program(lambda x: lax.sin(x) + lax.sin(x))
    with CONTEXTS[context]():
        x = jnp.linspace(0.1, 1.0, 4, dtype=jnp.float64 if context == "x64" else jnp.float32)
        x = jax.device_put(x, jax.P("i")) if context == "explicit mesh" else x
        live, graph = fg.live(f, Doubled()), fg.rewrite(fg.trace(f, x), Doubled())
        for got in (live, graph):
            np.testing.assert_allclose(got(x), want(x), rtol=1e-6)
            np.testing.assert_allclose(jax.grad(got)(x), jax.grad(want)(x), rtol=1e-5)
