"""What funcgrad adds to JAX's derivatives: Graphs, user rules, decorators, errors in the user's words."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

X = jnp.linspace(0.1, 1.0, 4)


def loss(w, x, mode="mean"):
    return jnp.mean(jnp.tanh(w * x)) if mode == "mean" else jnp.sum(x)


@pytest.mark.parametrize("verb", ["grad", "value_and_grad", "jacfwd", "jacrev", "hessian"])
@pytest.mark.parametrize("argnums", [(0, 1), pytest.param(0, marks=pytest.mark.slow), -1])
def test_a_graph_gives_a_graph(verb, argnums):
    graph = fg.trace(loss, 2.0, X)
    derived = getattr(fg, verb)(graph, argnums)
    assert isinstance(fg.verify(derived), fg.Graph)
    assert derived.name == f"{verb}(loss)"
    assert derived.paths == graph.paths
    want = jax.jit(getattr(jax, verb)(loss, argnums))(2.0, X)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(derived)(2.0, X), want)


def test_graphs_are_callables_to_the_other_verbs():
    graph = fg.trace(loss, 2.0, X)
    out, pull = fg.vjp(graph, 2.0, X)
    want, pull_want = jax.vjp(loss, 2.0, X)
    assert out == want
    jax.tree.map(np.testing.assert_array_equal, pull(1.0), pull_want(1.0))
    assert fg.jvp(graph, (2.0, X), (1.0, X)) == jax.jvp(loss, (2.0, X), (1.0, X))
    assert fg.linearize(graph, 2.0, X)[1](1.0, X) == jax.linearize(loss, 2.0, X)[1](1.0, X)


def test_higher_order_graphs():
    graph = fg.trace(lambda x: lax.sin(x) * x, 2.0)
    third = fg.grad(fg.grad(fg.grad(graph)))
    assert third.name == "grad(grad(grad(<lambda>)))"
    want = jax.grad(jax.grad(jax.grad(lambda x: lax.sin(x) * x)))(2.0)
    np.testing.assert_allclose(third(2.0), want, rtol=1e-6)


def test_aux_of_a_graph():
    graph = fg.trace(lambda x: (x**2, {"double": 2 * x}), 3.0)
    assert fg.grad(graph, has_aux=True)(3.0) == (6, {"double": 6})


def test_verbs_without_a_function_are_decorators():
    @fg.grad(argnums=1)
    def f(x, y):
        return x * y

    @fg.vmap(in_axes=(None, 0))
    @fg.value_and_grad
    def g(x, y):
        return x * y

    assert f(2.0, 3.0) == 2
    np.testing.assert_array_equal(g(2.0, X)[0], 2 * X)


straight_through = lambda eqn, x: x + lax.stop_gradient(lax.round(x) - x)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda x: lax.map(f, x[None])[0]])
def test_a_user_rule_overrides_the_gradient_of_a_primitive(wrap):
    f = wrap(lambda x: 3 * lax.round(x))
    assert jax.grad(f)(jnp.float32(0.7)) == 0
    f32 = jnp.float32(0.7)
    assert fg.grad(f, rules={lax.round_p: straight_through})(f32) == 3
    assert fg.value_and_grad(f, rules={lax.round_p: straight_through})(f32) == (3, 3)
    assert jax.jit(fg.grad(f, rules={lax.round_p: straight_through}))(f32) == 3
    assert fg.jacrev(f, rules={lax.round_p: straight_through})(f32) == 3
    assert fg.vjp(f, f32, rules={lax.round_p: straight_through})[1](jnp.float32(1)) == (3,)
    assert jax.grad(fg.differentiable(f, rules={lax.round_p: straight_through}))(f32) == 3
    assert fg.grad(fg.trace(f, f32), rules={lax.round_p: straight_through})(f32) == 3


def test_a_user_rule_can_be_a_custom_vjp_function():
    @jax.custom_vjp
    def clipped(x):
        return lax.sin(x)

    clipped.defvjp(lambda x: (lax.sin(x), x), lambda x, ct: (jnp.clip(ct * lax.cos(x), -0.1, 0.1),))
    f = lambda x: jnp.sum(lax.sin(3 * x))
    got = fg.grad(f, rules={lax.sin_p: lambda eqn, x: clipped(x)})(X)
    np.testing.assert_allclose(got, 3 * np.clip(np.cos(3 * np.asarray(X)), -0.1, 0.1), rtol=1e-6)


ERRORS = {
    "not a scalar": (
        lambda: fg.grad(lambda x: x * 2)(X),
        "grad needs a float scalar of shape (), and <lambda> returned float32[4].\n"
        "  at      FILE (<lambda>)\n"
        "  try     reduce it, as in jnp.mean(<lambda>(...)), or take fg.jacrev(<lambda>)",
    ),
    "integer output": (
        lambda: fg.value_and_grad(lambda x: jnp.int32(1))(1.0),
        "value_and_grad needs a float scalar of shape (), and <lambda> returned int32[].\n"
        "  at      FILE (<lambda>)\n"
        "  try     reduce it, as in jnp.mean(<lambda>(...)), or take fg.jacrev(<lambda>)",
    ),
    "tree output": (
        lambda: fg.grad(lambda x: {"a": x, "b": x})(1.0),
        "grad needs a float scalar of shape (), and <lambda> returned a dict of 2 leaves.\n"
        "  at      FILE (<lambda>)\n"
        "  try     reduce it, as in jnp.mean(<lambda>(...)), or take fg.jacrev(<lambda>)",
    ),
    "integer input": (
        lambda: fg.grad(loss)({"w": 3}, X),
        "grad differentiates loss with respect to w['w'], which holds int32.\n"
        "  at      FILE (loss)\n"
        "  try     leave it out of argnums, or cast it: float(w['w']), or set allow_int=True",
    ),
    "no array": (
        lambda: fg.jacfwd(loss, 2)(1.0, X, "mean"),
        "jacfwd differentiates loss with respect to mode, which is not an array but str.\n"
        "  at      FILE (loss)\n"
        "  inputs  mode = 'mean'\n"
        "  try     leave it out of argnums",
    ),
    "argnums": (
        lambda: fg.hessian(loss, (0, 3))(1.0, X),
        "hessian with argnums=(0, 3) needs 4 positional arguments, and loss was called with 2.\n"
        "  at      FILE (loss)\n"
        "  try     pass what is to be differentiated by position, or change argnums: loss(w, x, mode='mean')",
    ),
    "negative argnums": (
        lambda: fg.grad(loss, -3)(1.0, X),
        "grad with argnums=-3 needs 3 positional arguments, and loss was called with 2.\n"
        "  at      FILE (loss)\n"
        "  try     pass what is to be differentiated by position, or change argnums: loss(w, x, mode='mean')",
    ),
    "a graph of a vector": (
        lambda: fg.grad(fg.trace(lambda x: x * 2, X)),
        "grad needs a float scalar of shape (), and <lambda> returned float32[4].\n"
        "  try     reduce it, as in jnp.mean(<lambda>(...)), or take fg.jacrev(<lambda>)",
    ),
    "a graph of integers": (
        lambda: fg.grad(fg.trace(loss, 1, X)),
        "grad differentiates loss with respect to w, which holds int32.\n"
        "  try     leave it out of argnums, or cast it: w.astype(float), or set allow_int=True",
    ),
    "variadic": (
        lambda: fg.grad(lambda x, *rest: x, 2)(1.0, 2.0, 3),
        "grad differentiates <lambda> with respect to rest[1], which holds int32.\n"
        "  at      FILE (<lambda>)\n"
        "  try     leave it out of argnums, or cast it: float(rest[1]), or set allow_int=True",
    ),
    "no rules": (
        lambda: fg.grad(jnp.sin, rules=[1]),
        "rules= takes rules as a mapping, Rules or a Pass, and got list.",
    ),
    "no function": (
        lambda: fg.grad(3.0),
        "grad takes a function or a Graph, and got float.\n  inputs  3.0",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_speak_of_the_users_code(case):
    run, message = ERRORS[case]
    with pytest.raises(ValueError if case == "negative argnums" else TypeError) as e:
        run()
    assert re.sub(r"\S*test_grad\.py:\d+", "FILE", str(e.value)) == message


def test_errors_of_the_function_come_through():
    def f(x):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fg.grad(f)(1.0)

    def g(x):
        return x + None

    with pytest.raises(TypeError) as ours:
        fg.grad(g)(1.0)
    with pytest.raises(TypeError) as theirs:
        jax.grad(g)(1.0)
    assert str(ours.value) == str(theirs.value)


def test_tracebacks_show_no_frame_of_ours():
    def f(x):
        return jnp.sin(x) + jnp.ones(3) @ jnp.ones(4)

    with pytest.raises(TypeError) as e:
        fg.grad(f, rules={lax.sin_p: lambda eqn, x: lax.cos(x)})(1.0)
    files = [entry.path.name for entry in e.traceback if "site-packages" not in str(entry.path)]
    assert set(files) == {"test_grad.py"}
