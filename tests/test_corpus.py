"""Every transform on every program of the corpus, as a function and as a Graph: JAX's own programs and values."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcgrad as fg

from .checks import (
    LIVE,
    TRANSFORMS,
    assert_same_graph,
    assert_same_program,
    assert_same_values,
    check_eager,
    check_transform,
    identity_live,
    identity_rewrite,
    opcode_counts,
    options,
    summed,
)
from .conftest import sample_of
from .corpus import CORPUS, REVERSE

FORMS = ("function", "graph")
# Each operation that is run eagerly is a program that XLA compiles and keeps (0.7 MB): few of these in every run.
EAGERLY = ("call", "grad", "vmap", "jvp")
EAGER = [
    pytest.param(p, t, id=f"{p}-{t}") for p in CORPUS for t in TRANSFORMS if t.name in EAGERLY and t.name not in p.lacks
]
LOOPS = [p for p in CORPUS if p.lacks == REVERSE]  # while loops, which JAX cannot reverse and funcgrad can
DIFFERENTIABLE = [p for p in CORPUS if "grad" not in p.lacks]


@pytest.mark.sample(1 / 8, ("p", "transform"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_same_program(p, transform, form):
    if p in LOOPS and transform.name in REVERSE:
        pytest.skip("JAX has no program to compare with")
    check_transform(fg, transform, p, form)


@pytest.mark.sample(1 / 40, ("transform", "form"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("p", "transform"), EAGER)
def test_same_values_eagerly(p, transform, form):
    check_eager(fg, transform, p, form)


@pytest.mark.parametrize("p", LOOPS, ids=str)
def test_loops_are_reversed(p):
    """Reverse mode through while loops agrees with JAX's own forward mode."""
    got = fg.grad(summed(p.f), **options(p))(*p.args)
    want = jax.jacfwd(summed(p.f), argnums=p.diff)(*p.args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.sample(1 / 2)
@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_trace(p):
    graph = fg.verify(fg.trace(p.f, *p.args))
    assert graph.out_tree == jax.tree.structure(jax.eval_shape(p.f, *p.args))
    assert str(graph)
    assert_same_graph(fg.trace(graph, *p.args), graph)


@pytest.mark.sample(1 / 2)
@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_identity_rewrite(p):
    graph = fg.trace(p.f, *p.args)
    again = fg.verify(identity_rewrite(graph))
    assert_same_graph(again, graph)
    assert_same_program(again, p.f, p.args)


@pytest.mark.sample(1 / 4)
@pytest.mark.parametrize("p", DIFFERENTIABLE, ids=str)
def test_identity_rewrite_differentiated(p):
    graph = identity_rewrite(fg.trace(summed(p.f), *p.args))
    assert_same_program(jax.grad(graph, **options(p)), jax.grad(summed(p.f), **options(p)), p.args, is_graph=True)


@pytest.mark.sample(1 / 2)
@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_identity_live(p):
    assert_same_program(identity_live(p.f), p.f, p.args)


@pytest.mark.sample(1 / 16)
@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_identity_live_eagerly(p):
    assert_same_values(identity_live(p.f)(*p.args), p.f(*p.args))


@pytest.mark.sample(1 / 4)
@pytest.mark.parametrize("p", DIFFERENTIABLE, ids=str)
def test_identity_live_differentiated(p):
    assert_same_program(jax.grad(identity_live(summed(p.f)), **options(p)), jax.grad(summed(p.f), **options(p)), p.args)


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_identity_live_transformed(p, transform):
    check_transform(LIVE, transform, p)


@pytest.mark.sample(1 / 4)
@pytest.mark.parametrize("p", DIFFERENTIABLE, ids=str)
def test_live_outside_of_grad(p):
    """The order may be turned: the gradient itself is run live."""
    gradient = jax.grad(summed(p.f), **options(p))
    assert_same_program(identity_live(gradient), gradient, p.args)


# ------------------------------------------------------------------------------------------------ the checks themselves

X = jnp.arange(1.0, 4.0)
CONSTANT = np.arange(3, dtype=np.float32)


def scoped(x):
    with jax.named_scope("scope"):
        return jnp.sin(x)


@pytest.mark.parametrize(
    ("got", "want"),
    [(1.0, 1), (X, np.asarray(X)), (X, X.at[0].add(1e-6)), (jnp.asarray(1.0), jnp.float32(1)), ((X,), [X]), ("a", "b")],
)
def test_values_differ(got, want):
    assert_same_values(got, got)
    with pytest.raises(AssertionError):
        assert_same_values(got, want)


@pytest.mark.parametrize(
    "f",
    [
        jnp.cos,
        lambda x: -jnp.sin(-x),
        lambda x: jnp.sin(x) * jnp.float32(1 + 1e-6),
        lambda x: (jnp.sin(x),),
        lambda x: jnp.sin(x).astype(jnp.bfloat16),
    ],
)
def test_programs_differ(f):
    assert_same_program(jnp.sin, lambda x: jnp.sin(x), (X,))
    with pytest.raises(AssertionError):
        assert_same_program(f, jnp.sin, (X,))


@pytest.mark.parametrize(
    ("f", "g"),
    [
        (jnp.sin, scoped),
        (lambda x: x * 2, lambda x: x * 3),
        (lambda x: x + CONSTANT, lambda x: x + (CONSTANT + 1)),
        (lambda x: jax.jit(jnp.sin)(x), lambda x: jax.jit(jnp.cos)(x)),
        (
            lambda x: jnp.sin(x),  # of the same text, on another line
            lambda x: jnp.sin(x),
        ),
    ],
)
def test_graphs_differ(f, g):
    assert_same_graph(fg.trace(f, X), fg.trace(f, X))
    with pytest.raises(AssertionError):
        assert_same_graph(fg.trace(f, X), fg.trace(g, X))


def test_opcodes_are_counted():
    lowered = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) + jnp.sin(2 * y), x)).lower(X)
    assert opcode_counts(lowered)["stablehlo.sine"] == 2
    assert opcode_counts(lowered.compile())["while"] == 1


def test_a_sample_is_a_share_of_the_cases_that_covers_values():
    cases = [
        SimpleNamespace(nodeid=f"test[{p}-{t}]", callspec=SimpleNamespace(params={"p": p, "t": t}))
        for p in CORPUS
        for t in TRANSFORMS
    ]
    ids = lambda *arguments: {case.nodeid for case in sample_of(cases, *arguments)}
    assert len(ids("one", 1 / 8)) == math.ceil(len(cases) / 8)
    assert ids("one", 1 / 8) == ids("one", 1 / 8)
    assert ids("one", 1 / 8) != ids("two", 1 / 8)
    assert ids("one", 1.0) == {case.nodeid for case in cases}
    sample = sample_of(cases, "one", 0.0, ("p", "t"))
    assert {case.callspec.params["p"] for case in sample} == set(CORPUS)
    assert {case.callspec.params["t"] for case in sample} == set(TRANSFORMS)
    assert len(sample) < len(CORPUS) + len(TRANSFORMS)
