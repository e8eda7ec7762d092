"""`rewrite` and `verify`: new graphs from rules."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax
from jax import lax

import funcgrad as fg

COSINE = fg.Rules("cosine", {lax.sin_p: lambda eqn, x: lax.cos(x)})


def test_a_rule_replaces_equations_at_any_depth_and_keeps_scopes_and_lines():
    def f(x):
        with jax.named_scope("outer"):
            return jax.jit(lambda y: lax.fori_loop(0, 3, lambda i, c: lax.sin(c), y))(x)

    graph = fg.trace(f, 1.0)
    new = fg.verify(fg.rewrite(graph, COSINE))
    assert new(1.0) == pytest.approx(np.cos(np.cos(np.cos(1.0))))
    before, after = list(fg.walk(graph)), list(fg.walk(new))
    assert [p for p, _ in before] == [p for p, _ in after]
    assert [_jax.scope_of(e) for _, e in before] == [_jax.scope_of(e) for _, e in after]
    assert [_jax.source_lines(e) for _, e in before] == [_jax.source_lines(e) for _, e in after]
    assert [e.primitive.name for _, e in after if e.primitive.name in ("sin", "cos")] == ["cos"]


def test_what_no_rule_touches_is_the_same_graph():
    graph = fg.trace(jax.jit(lambda x: lax.exp(x)), 1.0)
    assert fg.rewrite(graph, COSINE) is graph


def test_shared_sub_graphs_are_looked_at_once():
    f = lambda x: lax.exp(x)
    for _ in range(24):  # 2**24 calls, were each followed
        f = (lambda g: jax.jit(lambda x: g(g(x))))(f)
    graph = fg.trace(f, 1.0)
    assert fg.rewrite(graph, COSINE) is graph
    assert "1 equations" in repr(graph)


def test_untouched_sub_graphs_stay_as_they_are():
    f = lambda x: jax.jit(lax.exp)(x) + jax.jit(lax.sin)(x)
    graph = fg.trace(f, 1.0)
    inner = lambda g: [e.params["jaxpr"] for e in g.eqns if e.primitive.name == "jit"]
    new = fg.rewrite(graph, COSINE)
    assert inner(new)[0] is inner(graph)[0]
    assert inner(new)[1] is not inner(graph)[1]


WRONG_RULES = {
    "shape": (
        lax.sin_p,
        lambda eqn, x: jnp.stack([x, x]),
        "the rule of 'sin' in bad returned float32[2] for float32[].",
    ),
    "dtype": (
        lax.sin_p,
        lambda eqn, x: x.astype(jnp.float16),
        "the rule of 'sin' in bad returned float16[] for float32[].",
    ),
    "number": (
        lax.sort_p,
        lambda eqn, *xs: xs[0],
        "the rule of 'sort' in bad returned float32[2] for float32[2], float32[2].",
    ),
    "nothing": (lax.sin_p, lambda eqn, x: (), "the rule of 'sin' in bad returned nothing for float32[]."),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: lax.cond(True, f, f, x)])
@pytest.mark.parametrize("case", WRONG_RULES)
def test_a_rule_must_keep_the_types(case, wrap):
    primitive, rule, message = WRONG_RULES[case]
    f = wrap(lambda x: lax.sort((lax.sin(x) + jnp.zeros(2), jnp.ones(2))))
    for run in (
        lambda: fg.live(f, fg.Rules("bad", {primitive: rule}))(jnp.float32(1)),
        lambda: fg.rewrite(fg.trace(f, jnp.float32(1)), fg.Rules("bad", {primitive: rule})),
    ):
        with pytest.raises(fg.GraphError) as e:
            run()
        lines = str(e.value).splitlines()
        assert lines[0] == message
        assert lines[1].startswith("  at      ")
        assert "test_rewrite.py" in lines[1]
        assert lines[2] == "  try     return as many values as the equation has outputs, of their shapes and dtypes"


def test_numbers_and_weak_types_become_those_of_the_equation():
    half = {lax.sin_p: lambda eqn, x: 0.5}
    got = fg.live(lax.sin, half)(jnp.float32(1))
    assert isinstance(got, jax.Array)
    assert not got.weak_type
    assert fg.rewrite(fg.trace(lax.sin, 1.0), half)(1.0).weak_type


def test_what_is_no_graph_and_no_rule_is_named():
    with pytest.raises(TypeError, match="rewrite takes a Graph, and got function"):
        fg.rewrite(lambda x: x, COSINE)
    for table in ({jnp.tanh: lambda eqn, x: x}, {"tanh": lambda eqn, x: x}, {lax.tanh_p: None}):
        with pytest.raises(TypeError, match="mine takes rules as primitive -> function"):
            fg.Rules("mine", table)
    for table in ({jnp.tanh: lambda eqn, x: x}, {lax.tanh_p: None}, {"tanh": None}):
        with pytest.raises(TypeError, match=r"takes rules as (primitive|scope pattern) -> function"):
            fg.grad(lax.tanh, rules=table)


def test_verify_finds_a_broken_graph():
    graph = fg.trace(lambda x: lax.sin(x) * 2, 1.0)
    assert fg.verify(graph) is graph
    swapped = graph.jaxpr.jaxpr.replace(eqns=graph.eqns[::-1])
    with pytest.raises(fg.GraphError, match="<lambda> is not well typed"):
        fg.verify(dataclasses.replace(graph, jaxpr=_jax.close(swapped)))
    with pytest.raises(fg.GraphError, match="these must agree"):
        fg.verify(dataclasses.replace(graph, paths=("x", "y")))


def test_a_rule_runs_once_for_each_equation():
    def f(x):
        for _ in range(500):
            x = lax.add(lax.sin(x), x)
        return x

    calls = []
    rules = fg.Rules("counted", {lax.sin_p: lambda eqn, x: (calls.append(eqn), lax.cos(x))[1]})
    graph = fg.trace(f, 1.0)
    assert len(fg.rewrite(graph, rules).eqns) == len(graph.eqns) == 1000
    assert len(calls) == 500


def test_donation_names_and_inlining_of_inner_jits_stay():
    inner = jax.jit(lambda y: lax.sin(y) * 2, donate_argnums=0, inline=False, keep_unused=True)
    graph = fg.trace(lambda x: inner(x), jnp.ones(3))
    (before,), (after,) = graph.eqns, fg.rewrite(graph, COSINE).eqns
    for key in ("donated_invars", "name", "keep_unused", "inline", "in_shardings", "out_shardings"):
        assert before.params[key] == after.params[key]


def test_effects_stay(capsys):
    def f(x):
        jax.debug.print("x is {}", x, ordered=True)
        return lax.scan(lambda c, _: (jax.debug.print("c is {}", c), (lax.sin(c), None))[1], x, None, length=2)[0]

    graph = fg.rewrite(fg.trace(f, 1.0), COSINE)
    assert len(graph.jaxpr.jaxpr.effects) == 2
    graph(1.0)
    jax.effects_barrier()
    assert capsys.readouterr().out == "x is 1.0\nc is 1.0\nc is 0.5403022766113281\n"
