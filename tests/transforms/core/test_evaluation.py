"""How Graphs are evaluated under JAX's traces: the same equations, and no work twice."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

import funcgrad as fg

from ...checks import assert_same_graph, assert_same_values

X = jnp.linspace(0.1, 1.0, 4)


def model(x):
    with jax.named_scope("layer"):
        y = jax.nn.relu(jnp.sin(x) * 2.0 + jnp.arange(4.0))
    return jnp.sum(lax.scan(lambda c, _: (jnp.tanh(c), None), y, None, length=3)[0])


def test_a_graph_that_is_staged_is_copied():
    graph = fg.trace(model, X)
    second = jax.make_jaxpr(graph)(X)
    assert_same_graph(second, graph.jaxpr)
    for old, new in zip(graph.eqns, second.jaxpr.eqns, strict=True):
        assert new.primitive is old.primitive
        assert _jax.line_of(new) == _jax.line_of(old)
        assert _jax.scope_of(new) == _jax.scope_of(old)
    with jax.named_scope("outer"):
        within = fg.trace(lambda x: jax.named_scope("inner")(graph)(x), X)
    assert [_jax.scope_of(e) for e in within.eqns] == [
        "/".join(["inner", *filter(None, [_jax.scope_of(e)])]) for e in graph.eqns
    ]


def test_functions_with_derivative_rules_are_not_traced_again():
    calls = []

    @jax.custom_vjp
    def f(x):
        calls.append("f")
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * 2,))
    graph = fg.trace(lambda x: jnp.sum(f(x)), X)
    calls.clear()
    jax.jit(graph).trace(X)
    assert not calls
    assert_same_values(jax.jit(jax.grad(graph))(X), jnp.full_like(X, 2.0))


derivatives = [fg.grad, jax.grad, fg.value_and_grad, fg.hessian]


@pytest.mark.parametrize("derive", derivatives)
def test_a_primitive_is_linearized_once_per_type(derive, monkeypatch):
    x = jnp.linspace(0.1, 1.0, 5 + derivatives.index(derive))  # of no other test
    jvp_rule, calls = _jax.ad.primitive_jvps[lax.erf_inv_p], []
    monkeypatch.setitem(_jax.ad.primitive_jvps, lax.erf_inv_p, lambda *a, **k: calls.append(a) or jvp_rule(*a, **k))
    make = lambda: jax.jit(derive(fg.trace(lambda x: jnp.sum(lax.erf_inv(x) * lax.erf_inv(x + 1)), x)))
    first = make().trace(x)
    assert calls
    calls.clear()
    second = make().trace(x)
    assert not calls
    assert_same_graph(second.jaxpr, first.jaxpr)


def test_numbers_and_constants_in_a_graph():
    table = jnp.arange(4.0)
    graph = fg.trace(lambda x: (x * 3.0 + table, 2.0, x), X)
    for call in (graph, jax.jit(graph), jax.jit(lambda x: jax.jvp(graph, (x,), (x,))[0])):
        out = call(X)
        assert_same_values(out[0], X * 3.0 + table)
        assert_same_values(out[1], jnp.asarray(2.0))
        assert_same_values(out[2], X)


def test_rules_and_taps_see_the_equations_of_a_graph_that_is_differentiated():
    graph = fg.trace(lambda x: jnp.sum(lax.sin(x)), X)
    doubled = fg.grad(graph, rules={lax.sin_p: lambda eqn, x: 2 * x})
    assert_same_values(jax.jit(doubled)(X), jnp.full_like(X, 2.0))
    inside = lambda x: fg.live(jax.grad(graph), {lax.cos_p: lambda eqn, x: 3 * x})(x)
    assert_same_values(jax.jit(inside)(X), 3 * X)
    _, seen = jax.jit(fg.tap(jax.grad(graph), where=fg.op("sin")))(X)
    assert list(seen) == ["sin#0"]


def test_effects_of_a_graph_stay_in_order():
    seen = []

    def f(x):
        jax.debug.callback(lambda v: seen.append(("first", float(v))), x, ordered=True)
        y = x * 2
        jax.debug.callback(lambda v: seen.append(("second", float(v))), y, ordered=True)
        return y

    graph = fg.trace(f, 1.0)
    jax.jit(lambda x: graph(graph(x)))(1.0)
    jax.effects_barrier()
    assert seen == [("first", 1.0), ("second", 2.0), ("first", 2.0), ("second", 4.0)]


def test_an_operation_is_kept_with_its_configuration():
    """Not one that another program's configuration was noted at."""
    f = lambda x: jnp.sum(lax.erf_inv(x))
    x = jnp.linspace(0.1, 1.0, 13)  # of no other test
    within = lambda f: lambda x: set_xla_metadata(mark="first")(f)(x)
    marks = lambda f: jax.jit(f).lower(x).as_text().count("first")
    assert marks(jax.grad(fg.trace(within(f), x))) == marks(jax.grad(within(f))) > 0
    assert marks(jax.grad(fg.trace(f, x))) == 0
    assert marks(within(fg.trace(f, x))) == marks(within(f)) > 0


def test_what_a_user_passes_to_an_operation_is_not_kept():
    class Held:
        def __call__(self, v):
            return np.asarray(v)

    held = Held()
    reference = weakref.ref(held)
    f = lambda x, held=held: jnp.sum(x * jax.pure_callback(held, jax.typeof(x), lax.stop_gradient(x)))
    jax.jit(jax.grad(fg.trace(f, X))).trace(X)
    del f, held
    jax.clear_caches()
    gc.collect()
    assert reference() is None


def test_a_rule_is_called_for_each_equation():
    lines = []

    def rule(eqn, x):
        lines.append(_jax.line_of(eqn))
        return x + 1

    def f(x):
        y = lax.sin(x)
        return jnp.sum(y * lax.sin(x))

    jax.jit(fg.grad(fg.trace(f, X), rules={lax.sin_p: rule})).trace(X)
    assert len(set(lines)) == len(lines) == 2


def test_axes_and_references_of_a_graph_are_those_of_its_call():
    graph = fg.trace(jax.vmap(lambda x: lax.psum(x, "lanes"), axis_name="lanes"), X)
    assert_same_values(jax.jit(graph)(X), jnp.full_like(X, X.sum()))

    def accumulate(ref, x):
        ref[...] += x
        return ref[...] * 2

    ref = jax.new_ref(jnp.zeros(4))
    traced = fg.trace(lambda x: accumulate(ref, x), X)
    assert_same_values(jax.jit(traced)(X), 2 * X)
    assert_same_values(jax.jit(lambda x: traced(x) + traced(x))(X), 4 * X + 6 * X)
