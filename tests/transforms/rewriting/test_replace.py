"""`replace`: pattern and replacement are ordinary functions; the reference is the program written by hand."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ...checks import assert_close_values, assert_same_graph, assert_same_program, assert_same_values
from ...corpus import CORPUS, MESH
from ...sampling import sampled

X = jnp.linspace(0.1, 1.2, 12).reshape(3, 4)
V = jnp.linspace(-1, 1, 4)
W = np.linspace(-2, 2, 4, dtype=np.float32)
HERE = __file__


class Case(NamedTuple):
    """`f` with each match of the pattern replaced is the program `by_hand`."""

    f: Callable
    pattern: Callable
    replacement: Callable
    by_hand: Callable | None  # None: nothing matches
    count: int = 1
    args: tuple = (X, V)


def text(graph: Any) -> str:
    """A graph up to its name, the names of variables, scopes and the user's lines."""
    lines = graph.text(lines=None).partition("(")[2].splitlines()
    return "\n".join(line.strip() for line in lines if not line.endswith(":"))


twice_or_thrice = lambda x, y: (jnp.sin(x) * y, jnp.cos(x) * y)

CASES = {
    "a free variable is any value": Case(
        lambda x, y: jnp.sin(x + y) * 3, lambda a: jnp.sin(a), jnp.cos, lambda x, y: jnp.cos(x + y) * 3
    ),
    "several operations": Case(
        lambda x, y: jnp.exp(jnp.sin(x) * y), lambda a, b: jnp.sin(a) * b, jnp.add, lambda x, y: jnp.exp(x + y)
    ),
    "commutative": Case(lambda x, y: y * jnp.sin(x), lambda a, b: jnp.sin(a) * b, jnp.add, lambda x, y: x + y),
    "commutative, nested": Case(
        lambda x, y: jnp.maximum(y, y + y * jnp.sin(x)),
        lambda a, b: jnp.maximum(jnp.sin(a) * b + b, b),
        lambda a, b: a - b,
        lambda x, y: x - y,
    ),
    "commutative, chosen late": Case(
        lambda x, y: (jnp.sin(x) + y) * (jnp.sin(y) + x),
        lambda a, b: (jnp.sin(b) + a) * (jnp.sin(a) + b),
        lambda a, b: b / a,
        lambda x, y: x / y,
        args=(V, V + 2),
    ),
    "not commutative": Case(lambda x, y: x - jnp.sin(y), lambda a, b: jnp.sin(a) - b, jnp.add, None),
    "a variable twice": Case(
        lambda x, y: (x * x, x * y), lambda a: a * a, lambda a: 2 * a, lambda x, y: (2 * x, x * y), args=(X, X)
    ),
    "a variable twice, computed twice": Case(
        lambda x, y: jnp.sin(x + y) * jnp.sin(y + x), lambda a: a * a, lambda a: 2 * a, lambda x, y: 2 * jnp.sin(x + y)
    ),
    "computed once in the graph, twice in the pattern": Case(
        lambda x, y: (lambda e: e / jnp.sum(e))(jnp.exp(x)),
        lambda a: jnp.exp(a) / jnp.sum(jnp.exp(a)),
        lambda a: jax.nn.softmax(a, axis=None),
        lambda x, y: jax.nn.softmax(x, axis=None),
    ),
    "computed twice in the graph, once in the pattern": Case(
        lambda x, y: jnp.exp(x) / jnp.sum(jnp.exp(x)),
        lambda a: (lambda e: e / jnp.sum(e))(jnp.exp(a)),
        lambda a: jax.nn.softmax(a, axis=None),
        lambda x, y: jax.nn.softmax(x, axis=None),
    ),
    "equal literals": Case(lambda x, y: 2 * x + 3 * y, lambda a: a * 2, lambda a: a + a, lambda x, y: x + x + 3 * y),
    "unequal literals": Case(lambda x, y: 2 * x, lambda a: a * 2.5, jnp.sin, None),
    "literals of another type": Case(lambda x, y: x**2, lambda a: a**3, jnp.sin, None),
    "a variable is a literal": Case(
        lambda x, y: jnp.sin(x) * 2.0, lambda a, s: jnp.sin(a) * s, lambda a, s: a * s, lambda x, y: x * 2.0
    ),
    "a variable is a constant": Case(
        lambda x, y: jnp.sin(x) * W, lambda a, s: jnp.sin(a) * s, lambda a, s: a * s, lambda x, y: x * W
    ),
    "equal constants": Case(lambda x, y: jnp.sin(x * W), lambda a: a * W.copy(), lambda a: a + W, lambda x, y: jnp.sin(x + W)),
    "unequal constants": Case(lambda x, y: jnp.sin(x * W), lambda a: a * (W + 1), lambda a: a + W, None),
    "constants in the replacement only": Case(
        lambda x, y: jnp.sin(x), lambda a: jnp.sin(a), lambda a: a * W, lambda x, y: x * W
    ),
    "through jits": Case(
        lambda x, y: jax.jit(jnp.exp)(jax.jit(lambda x: jnp.sin(x) * 2)(x)) + jax.jit(jnp.tanh)(y),
        lambda a: jnp.exp(jnp.sin(a) * 2),
        jnp.cos,
        lambda x, y: jnp.cos(x) + jax.jit(jnp.tanh)(y),
    ),
    "jits in the pattern": Case(
        lambda x, y: jnp.exp(jnp.sin(x) * 2),
        jax.jit(lambda a: jnp.exp(jax.jit(lambda a: jnp.sin(a) * 2)(a))),
        jnp.cos,
        lambda x, y: jnp.cos(x),
    ),
    "einsum is @": Case(
        lambda x, y: jnp.einsum("ij,j->i", x, y), lambda a, b: a @ b, lambda a, b: (a * b).sum(1), lambda x, y: (x * y).sum(1)
    ),
    "converted numbers in library jits": Case(
        lambda x, y: jnp.where(x > 0, x, 0) * 2,
        lambda a: jnp.where(a > 0, a, 0.0),
        lambda a: jnp.maximum(a, 0),
        lambda x, y: jnp.maximum(x, 0) * 2,
    ),
    "custom_jvp as one": Case(
        lambda x, y: jax.nn.relu(x) * y, lambda a, b: jax.nn.relu(a) * b, jnp.add, lambda x, y: x + y
    ),
    "loops as one": Case(
        lambda x, y: jnp.sin(lax.fori_loop(0, 3, lambda i, c: c * 2, x)),
        lambda a: lax.fori_loop(0, 3, lambda j, d: d * 2, a),
        lambda a: a * 8,
        lambda x, y: jnp.sin(x * 8),
    ),
    "other loops": Case(
        lambda x, y: jnp.sin(lax.fori_loop(0, 3, lambda i, c: c * 2, x)),
        lambda a: lax.fori_loop(0, 3, lambda j, d: d * 3, a),
        lambda a: a * 8,
        None,
    ),
    "parameters differ": Case(lambda x, y: jnp.sum(x, axis=0), lambda a: jnp.sum(a, axis=1), jnp.sin, None),
    "what is used elsewhere stays": Case(
        lambda x, y: (lambda s: (s * y, s))(jnp.sin(x)),
        lambda a, b: jnp.sin(a) * b,
        lambda a, b: a + b,
        lambda x, y: (lambda s: (x + y, s))(jnp.sin(x)),
    ),
    "what is shared by two matches goes": Case(
        lambda x, y: (lambda s: (s * y, 2.0 * s))(jnp.sin(x)),
        lambda a, b: jnp.sin(a) * b,
        lambda a, b: a + b,
        lambda x, y: (x + y, x + 2.0),
        count=2,
    ),
    "overlap: the first in program order": Case(
        lambda x, y: jnp.sin(jnp.sin(jnp.sin(x))), lambda a: jnp.sin(jnp.sin(a)), jnp.cos, lambda x, y: jnp.sin(jnp.cos(x))
    ),
    "the result is not searched": Case(
        lambda x, y: x + y * 2, lambda a, b: a + b, lambda a, b: b + a, lambda x, y: y * 2 + x, args=(X, X)
    ),
    "several outputs": Case(
        lambda x, y: (jnp.sin(x) * y, jnp.cos(x) + y),
        lambda a: (jnp.sin(a), jnp.cos(a)),
        lambda a: (a * 2, a * 3),
        lambda x, y: (lambda s, c: (s * y, c + y))(x * 2, x * 3),
    ),
    "several outputs, in another order": Case(
        lambda x, y: (jnp.sin(x), jnp.cos(x)),
        lambda a: {"b": jnp.sin(a), "a": jnp.cos(a)},
        lambda a: {"a": a * 3, "b": a * 2},
        lambda x, y: (lambda c, s: (s, c))(x * 3, x * 2),
    ),
    "several outputs, one inside the other": Case(
        lambda x, y: (lambda e: (e * y, e / jnp.sum(e)))(jnp.exp(x)),
        lambda a: (lambda e: (e, e / jnp.sum(e)))(jnp.exp(a)),
        lambda a: (jnp.exp(a), jax.nn.softmax(a, axis=None)),
        lambda x, y: (lambda e, p: (e * y, p))(jnp.exp(x), jax.nn.softmax(x, axis=None)),
    ),
    "several outputs, too late": Case(
        lambda x, y: jnp.cos(jnp.sin(x) * 2), lambda a, b: (jnp.sin(a), jnp.cos(b)), lambda a, b: (b, a), None
    ),
    "one output of several": Case(
        lambda x, y: tuple(lax.top_k(x, 2)),
        lambda a: lax.top_k(a, 2)[0],
        lambda a: jnp.sort(a)[:, :1:-1],
        lambda x, y: (jnp.sort(x)[:, :1:-1], lax.top_k(x, 2)[1]),
    ),
    "ranks and dtypes": Case(
        lambda x, y: (jnp.sin(x) * x, jnp.sin(y) * y, jnp.sin(jnp.bfloat16(2)) * jnp.bfloat16(2)),
        lambda a: a * jnp.sin(a),
        lambda a: a,
        lambda x, y: (x, y, jnp.bfloat16(2)),
        count=3,
    ),
    "weak types": Case(
        lambda x, y: (jnp.sin(x) * 2, jnp.sin(y) * 2, jnp.sin(2.0) * 2),
        lambda a: jnp.sin(a) * 2,
        lambda a: jnp.cos(a),
        lambda x, y: (jnp.cos(x), jnp.cos(y), jnp.cos(2.0)),
        count=3,
        args=(X, 2.0),
    ),
    "nothing to compute from": Case(
        lambda x, y: x + jnp.zeros((3, 4)), lambda a: a + jnp.zeros(a.shape), lambda a: a * 1, lambda x, y: x * 1
    ),
    "more than it replaces": Case(
        lambda x, y: x @ y, lambda a, b: a @ b, lambda a, b: jnp.sin(a) @ b, lambda x, y: jnp.sin(x) @ y
    ),
    "optional parameters": Case(
        lambda x, y: jnp.log(jax.nn.softmax(x)), lambda x, axis=-1: jnp.log(jax.nn.softmax(x, axis)),
        jax.nn.log_softmax, lambda x, y: jax.nn.log_softmax(x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_match_is_replaced(name):
    case = CASES[name]
    graph = fg.trace(case.f, *case.args)
    new = fg.verify(fg.replace(graph, case.pattern, case.replacement))
    assert isinstance(new, fg.Replaced)
    if case.by_hand is None:
        assert (new.count, new.at) == (0, ())
        assert new.jaxpr is graph.jaxpr
    else:
        assert new.count == case.count
        assert all(line.startswith(HERE) for line in new.at)
        assert_same_values(new(*case.args), case.by_hand(*case.args))
        assert text(new) == text(fg.trace(case.by_hand, *case.args))
        assert fg.replace(graph, case.pattern, case.pattern).count == case.count


# What a match may lie in: each makes a function of x of one that maps x to x + 1, or keeps its shape.

custom_jvp = jax.custom_jvp(lambda f, x: f(x), nondiff_argnums=(0,))
custom_jvp.defjvp(lambda f, primals, tangents: (f(*primals), 3 * tangents[0]))
custom_vjp = jax.custom_vjp(lambda f, x: f(x), nondiff_argnums=(0,))
custom_vjp.defvjp(lambda f, x: (f(x), None), lambda f, _, g: (3 * g,))

DEPTHS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jits": lambda f: lambda x: jax.jit(lambda x: jax.jit(f)(x) + 1)(x),
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(c), c.sum()), x, None, length=3),
    "scan over layers": lambda f: lambda x: lax.scan(lambda c, w: (f(c * w), None), x, jnp.ones((3, 4)))[0],
    "while": lambda f: lambda x: lax.while_loop(lambda c: f(c).sum() < 3, lambda c: c + 1, x),
    "fori": lambda f: lambda x: lax.fori_loop(0, x.shape[0], lambda i, c: f(c), x),
    "cond": lambda f: lambda x: lax.cond(x.sum() > 0, f, lambda x: x * 2, x),
    "switch": lambda f: lambda x: lax.switch(1, [jnp.sin, f, jnp.cos], x),
    "remat": jax.checkpoint,
    "remat in scan": lambda f: lambda x: lax.scan(lambda c, _: (jax.checkpoint(f)(c), None), x, None, length=2)[0],
    "custom_jvp": lambda f: functools.partial(custom_jvp, f),
    "custom_vjp": lambda f: functools.partial(custom_vjp, f),
    "scan in cond in jit": lambda f: jax.jit(
        lambda x: lax.cond(True, lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0], f, x)
    ),
    "composite": lambda f: lax.composite(f, "mine.f"),
    "shard_map": lambda f: jax.shard_map(f, mesh=MESH, in_specs=P(None, "i"), out_specs=P(None, "i")),
    "associative_scan": lambda f: lambda x: lax.associative_scan(lambda a, b: f(a) * b, x),
    "map": lambda f: functools.partial(lax.map, f),
}  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "constants"),
    [
        *((depth, "literals") for depth in DEPTHS),
        *itertools.product(["jit", "scan", "while", "remat", "custom_vjp", "shard_map"], ["constants", "tracers"]),
    ],
)
def test_matches_are_found_and_replaced_at_any_depth(depth, constants):
    wrap = DEPTHS[depth]

    def check(scale):
        pattern, replacement = lambda a: jnp.sin(a) * 2, lambda a: jnp.cos(a) * scale
        graph = fg.trace(wrap(pattern), X)
        new = fg.verify(fg.replace(graph, pattern, replacement))
        want = fg.trace((DEPTHS["plain"] if depth == "composite" else wrap)(replacement), X)
        assert new.count == sum(e.primitive is lax.sin_p for _, e in fg.walk(graph)) - (depth == "switch")
        assert [e.primitive for _, e in fg.walk(new) if e.primitive in (lax.sin_p, lax.cos_p)] == [
            e.primitive for _, e in fg.walk(want) if e.primitive in (lax.sin_p, lax.cos_p)
        ]
        if constants == "literals":
            assert depth in ("jit", "jits", "composite") or text(new) == text(want)
        return new(X), want(X)

    scale = {"literals": 1.5, "constants": np.float32([1.5, 1.5, 1.5, 1.5][:1]), "tracers": None}[constants]
    got, want = jax.jit(check)(jnp.float32(1.5)) if scale is None else check(scale)
    assert_close_values(got, want)


@pytest.mark.parametrize("depth", ["custom_jvp", "custom_vjp"])
def test_derivative_rules_stay(depth):
    f = DEPTHS[depth](lambda x: jnp.sin(x) * 2)
    new = fg.replace(fg.trace(f, X), lambda a: jnp.sin(a) * 2, jnp.cos)
    assert_same_values(new(X), jnp.cos(X))
    assert_same_values(fg.grad(lambda x: new(x).sum())(X), jnp.full_like(X, 3.0))
    assert_same_values(jax.jit(jax.grad(lambda x: new(x).sum()))(X), jnp.full_like(X, 3.0))


def test_transformed_graphs_are_searched_and_replaced_graphs_transformed():
    f = lambda x: jnp.sum(jnp.tanh(jax.nn.softmax(x) * 2))
    pattern, by_hand = lambda a: jnp.tanh(a * 2), lambda a: 1 - 2 / (jnp.exp(4 * a) + 1)
    g = lambda x: jnp.sum(by_hand(jax.nn.softmax(x)))
    graph = fg.trace(f, V)
    new = fg.replace(graph, pattern, by_hand)
    assert new.count == 1
    for derive in (fg.grad, fg.value_and_grad, fg.hessian, lambda f: fg.vmap(f, axis_size=2)):
        after = fg.verify(derive(new))
        assert type(after) is fg.Graph
        args = (V,) if after.in_avals[0].shape == V.shape else (jnp.stack([V, 2 * V]),)
        assert_close_values(jax.jit(after)(*args), jax.jit(derive(g))(*args))
        replaced = fg.replace(derive(graph), pattern, by_hand)
        assert replaced.count == 1  # the primal computation
        assert_close_values(jax.jit(replaced)(*args), jax.jit(derive(f))(*args))
    assert_same_program(new, g, (V,), is_graph=True)


def test_sums_of_the_backward_pass_are_sums():
    graph = fg.grad(fg.trace(lambda y: jnp.sum(jnp.sin(y) + jnp.exp(y)), V))
    assert "add_any" in graph.text()
    new = fg.replace(graph, lambda a, b: a + b, lambda a, b: a * 3 + b * 3)
    assert new.count == 2  # forward and backward
    assert_close_values(new(V), 3 * graph(V))


def test_a_jit_with_a_match_inside_stays_one_and_stays_shared():
    block = jax.jit(lambda x: jnp.tanh(jnp.sin(x) * 2) + 1)
    graph = fg.trace(lambda x: block(block(block(x))), X)
    new = fg.replace(graph, lambda a: jnp.sin(a) * 2, jnp.cos)
    assert new.count == 3
    assert len(new.at) == 1
    bodies = [e.params["jaxpr"] for e in new.eqns]
    assert len(bodies) == 3
    assert bodies[0] is bodies[1] is bodies[2]
    assert_same_values(jax.jit(new)(X), jax.jit(lambda x: [x := jnp.tanh(jnp.cos(x)) + 1 for _ in range(3)][-1])(X))


def test_shared_sub_graphs_are_searched_once():
    f = lambda x: lax.sin(x) * 2
    for _ in range(24):  # 2**24 calls, were each followed
        f = (lambda g: jax.jit(lambda x: g(g(x))))(f)
    graph = fg.trace(f, 1.0)
    assert fg.replace(graph, lambda a: jnp.cos(a) * 2, jnp.tanh).jaxpr is graph.jaxpr
    new = fg.replace(graph, lambda a: jnp.sin(a) * 2, jnp.tanh)
    assert new.count == 2**24
    assert len(new.at) == 1


def test_a_jit_that_says_more_than_its_body_is_not_looked_through():
    inner = jax.jit(lambda y: jnp.sin(y), donate_argnums=0)
    graph = fg.trace(lambda x: inner(x * 2) + 1, X)
    assert fg.replace(graph, lambda a: jnp.sin(a * 2), jnp.cos).count == 0
    new = fg.replace(graph, lambda a: jnp.sin(a), jnp.cos)
    (before,), (after,) = ([e for e in g.eqns if e.primitive.name == "jit"] for g in (graph, new))
    assert before.params["donated_invars"] == after.params["donated_invars"] == (True,)


def test_composites_of_other_names_are_others():
    named = lambda name: lambda x: lax.composite(lambda x: jnp.sin(x) * 2, name)(x)
    graph = fg.trace(lambda x: named("mine.a")(x) + named("mine.b")(x * 3), X)
    new = fg.replace(graph, named("mine.a"), lambda x: x * 100)
    assert new.count == 1
    np.testing.assert_allclose(new(X), X * 100 + jnp.sin(X * 3) * 2, rtol=1e-6)


@pytest.mark.parametrize(("fill", "count"), [(0.0, 0), (-0.0, 1), (np.nan, 0)])
def test_parameters_are_equal_to_the_bit(fill, count):
    rows = lax.GatherDimensionNumbers(offset_dims=(0,), collapsed_slice_dims=(0,), start_index_map=(0,))
    taken = lambda fill: lambda x: lax.gather(x, jnp.array([7]), rows, (1, 4), mode="fill", fill_value=fill)
    matches = lambda a, b: fg.replace(fg.trace(taken(a), X), taken(b), lambda x: jnp.full(4, 5.0)).count
    assert matches(-0.0, fill) == count
    assert matches(np.nan, float("nan")) == 1


def test_a_graph_that_was_traced_with_64_bits_in_part():
    def f(x):
        with jax.enable_x64(True):
            return lax.convert_element_type(jnp.cos(lax.convert_element_type(x, jnp.float64)), jnp.float32)

    new = fg.replace(fg.trace(f, X), lambda x: jnp.cos(x), lambda x: x * 2)
    assert new.count == 1
    np.testing.assert_allclose(new(X), X * 2, rtol=1e-6)


def test_constants_are_known_inside_sub_graphs():
    def f(x):
        y = lax.scan(lambda c, _: (jnp.sin(c * W), None), x, None, length=2)[0]
        y = lax.cond(True, lambda y: jnp.sin(y * W), lambda y: y, y)
        y = lax.while_loop(lambda y: jnp.sum(y * W) > 1e3, lambda y: jnp.sin(y * W), y)
        return jax.checkpoint(lambda y: jax.jit(lambda y, s: y * s)(y, 2.0) * W)(y)

    graph = fg.trace(f, X)
    assert fg.replace(graph, lambda a: a * W, lambda a: a - W).count == 5
    assert fg.replace(graph, lambda a: a * (W + 1), lambda a: a - W).count == 0
    assert fg.replace(graph, lambda a: a * 2.0 * W, lambda a: a - W).count == 1
    new = fg.replace(graph, lambda a: a * W, lambda a: W * a)
    assert_same_values(new(X), graph(X))


def test_scopes_and_lines_are_those_of_the_match():
    def f(x):
        with jax.named_scope("outer"):
            x = jnp.exp(x)
            return jax.jit(lambda y: lax.scan(inner, y, None, length=2)[0])(x)

    def inner(c, _):
        with jax.named_scope("inner"):
            return jnp.sin(c) * 2, None

    new = fg.replace(fg.trace(f, X), lambda a: jnp.sin(a) * 2, jnp.cos)
    line = inner.__code__.co_firstlineno + 2
    assert new.at == (f"{HERE}:{line} ({inner.__code__.co_qualname}) in outer/inner",)
    (cosine,) = [e for _, e in fg.walk(new) if e.primitive is lax.cos_p]
    assert "inner" in str(cosine.source_info.name_stack)
    assert f"test_replace.py:{line} (test_scopes" in new.text(source=True)
    assert repr(new).endswith(", 2 equations, 1 replaced)")


def test_effects_stay(capsys):
    def f(x):
        jax.debug.print("x is {}", x, ordered=True)
        y = jnp.sin(x)
        jax.debug.print("y is {}", y, ordered=True)
        return y * 2

    new = fg.replace(fg.trace(f, 1.0), lambda a: jnp.sin(a) * 2, jnp.cos)
    assert new.count == 1
    assert new(1.0) == pytest.approx(math.cos(1))
    jax.effects_barrier()
    assert capsys.readouterr().out == "x is 1.0\ny is 0.8414709568023682\n"


def test_no_match_leaves_the_graph_as_it_is():
    for program in CORPUS[::5]:
        graph = fg.trace(program.f, *program.args)
        new = fg.replace(graph, lambda a: lax.erf_inv(lax.tan(a)), lambda a: a)
        assert new.count == 0
        assert_same_graph(new, graph)
        assert (new.in_tree, new.out_tree, new.paths, new.name) == (
            graph.in_tree,
            graph.out_tree,
            graph.paths,
            graph.name,
        )


SELF = [
    lambda a, b: a + b,
    lambda a, b: b * a,
    lambda a, b, c: a * b + c,
    lambda a, b: a / b,
    lambda a, b: a @ b,
    lambda a: jnp.max(a, axis=-1, keepdims=True),
    lambda a: (jnp.sin(a), jnp.cos(a)),
]


SAMPLE = (
    "branches_in_loops",
    "checkpoint",
    "conv_1d",
    "custom_jvp",
    "custom_vjp_in_loops",
    "dense",
    "fori_loop",
    "jit_shared",
    "references",
    "reductions",
    "scan_tree_carry",
    "shard_map",
    "while_in_scan",
)


@pytest.mark.parametrize("program", sampled(CORPUS, SAMPLE))
def test_what_is_replaced_by_itself_stays_the_same_program(program):
    graph = fg.trace(program.f, *program.args)
    new, count = graph, 0
    for f in SELF:
        new = fg.verify(fg.replace(new, f, f))
        count += new.count
    if count:
        assert_same_program(new, graph, program.args, is_graph=True)


def attention(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def transformer(layers: int, is_scanned: bool = False, width: int = 32, heads: int = 4) -> tuple[Callable, tuple]:
    def block(x, p, attend):
        q, k, v = (jnp.reshape(x @ p[c], (*x.shape[:2], heads, -1)) for c in "qkv")
        x = x + attend(q, k, v).reshape(x.shape) @ p["o"]
        y = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return x + jax.nn.gelu(y @ p["up"]) @ p["down"]

    shapes = dict.fromkeys("qkvo", (width, width)) | {"up": (width, 4 * width), "down": (4 * width, width)}
    keys = iter(jax.random.split(jax.random.key(0), 100))
    p = {c: 0.1 * jax.random.normal(next(keys), (layers, *shape)) for c, shape in shapes.items()}
    x = jax.random.normal(next(keys), (2, 6, width))

    def f(p, x, attend=attention):
        if is_scanned:
            return lax.scan(lambda x, p: (jax.checkpoint(lambda x, p: block(x, p, attend))(x, p), None), x, p)[0]
        for k in range(layers):
            x = block(x, {c: w[k] for c, w in p.items()}, attend)
        return x

    return f, (p, x)


@pytest.mark.parametrize("is_scanned", [False, True])
def test_attention_of_a_transformer(is_scanned):
    f, args = transformer(2, is_scanned, width=16, heads=2)
    by_hand = lambda p, x: f(p, x, jax.nn.dot_product_attention)
    new = fg.verify(fg.replace(fg.trace(f, *args), attention, jax.nn.dot_product_attention))
    assert new.count == (1 if is_scanned else 2)
    assert_same_program(new, by_hand, args)
    loss = lambda f: lambda p, x: jnp.sum(f(p, x) ** 2)
    want = jax.jit(jax.grad(loss(by_hand)))(*args)
    assert_close_values(jax.jit(fg.grad(fg.trace(loss(new), *args)))(*args), want)
    backward = fg.replace(fg.grad(fg.trace(loss(f), *args)), attention, jax.nn.dot_product_attention)
    assert_close_values(jax.jit(backward)(*args), want)


def test_every_match_of_a_large_graph_is_replaced():
    def chain(x):
        for _ in range(500):
            x = lax.add(lax.sin(x), x)
        return x

    new = fg.replace(fg.trace(chain, 1.0), lambda a, b: jnp.sin(a) + b, lambda a, b: a - b)
    assert (new.count, len(new.eqns)) == (500, 500)


# Errors


def naive(x, y):
    return jnp.sin(x) * y


def errors(graph):
    def wrong(x, y):
        return jnp.sum(x * y)

    def printing(x):
        jax.debug.print("{}", x)
        return jnp.sin(x)

    at = lambda f: f"{HERE}:{f.__code__.co_firstlineno} ({f.__code__.co_name})"
    used = "a match says what each parameter is: use it, or leave it out of both functions"
    identity = "return what operations on the parameters give, and nothing else"
    same = "give both the same positional parameters, in the same order"
    f = graph.__wrapped__
    return [
        (
            (graph, naive, wrong),
            fg.GraphError,
            f"""the replacement wrong returned float32[] where the pattern naive gives float32[3,4].
  at      {HERE}:{f.__code__.co_firstlineno + 1} ({f.__code__.co_qualname})
  inputs  x: float32[3,4], y: float32[4]
  try     return what the pattern returns: the same tree, shapes and dtypes""",
        ),
        ((graph, lambda a: jnp.sin(a), lambda a: (a, a)), fg.GraphError, "the replacement <lambda> returned float32[3,4], "
         f"""float32[3,4] where the pattern <lambda> gives float32[3,4].
  at      {HERE}:{f.__code__.co_firstlineno + 1} ({f.__code__.co_qualname})
  inputs  a: float32[3,4]
  try     return what the pattern returns: the same tree, shapes and dtypes"""),
        ((graph, lambda a: a, lambda a: a), fg.GraphError, f"""the pattern <lambda> returns a value that it does not compute.
  at      {{at}}
  try     {identity}"""),
        ((graph, lambda a: (jnp.sin(a), a), lambda a: (a, a)), fg.GraphError,
         f"""the pattern <lambda> returns a value that it does not compute.
  at      {{at}}
  try     {identity}"""),
        ((graph, lambda a: (), lambda a: ()), fg.GraphError, f"""the pattern <lambda> returns a value that it does not compute.
  at      {{at}}
  try     {identity}"""),
        ((graph, lambda x, unused: jnp.sin(x), naive), fg.GraphError, f"""the pattern <lambda> does not use unused.
  at      {{at}}
  try     {used}"""),
        ((graph, printing, jnp.sin), fg.GraphError, f"""the pattern printing has effects.
  at      {at(printing)}
  try     match what is computed: no prints, callbacks or references"""),
        ((graph, naive, lambda x: x), fg.ArgumentError,
         f"""the pattern naive takes (x, y), and the replacement <lambda> takes (x).
  at      {{at}}
  try     {same}"""),
        ((graph, naive, lambda y, x: x), fg.ArgumentError,
         f"""the pattern naive takes (x, y), and the replacement <lambda> takes (y, x).
  at      {{at}}
  try     {same}"""),
        ((graph, lambda *xs: xs[0], naive), fg.ArgumentError,
         """the pattern <lambda> takes *xs, and free variables are positional parameters.
  at      {at}
  try     name each: lambda x, y: ..."""),
        ((naive, naive, naive), fg.ArgumentError, """replace takes a Graph, and got function.
  try     fg.trace(f, *args) makes one"""),
        ((graph, 1.0, naive), fg.ArgumentError, "replace takes the pattern as a function, and got float."),
        ((graph, naive, None), fg.ArgumentError, "replace takes the replacement as a function, and got NoneType."),
    ]  # fmt: skip


@pytest.mark.parametrize("k", range(13))
def test_errors(k):
    def f(x, y):
        return jnp.exp(jnp.sin(x) * y)

    graph = fg.trace(f, X, V)
    object.__setattr__(graph, "__wrapped__", f)
    arguments, kind, message = errors(graph)[k]
    with pytest.raises(kind) as e:
        fg.replace(*arguments)
    assert isinstance(e.value, TypeError if kind is fg.ArgumentError else ValueError)
    code = next((g.__code__ for g in arguments[:0:-1] if getattr(g, "__name__", "") == "<lambda>"), None)
    where = f"{HERE}:{code.co_firstlineno} (<lambda>)" if code else ""
    assert str(e.value) == message.replace("{at}", where)


def test_a_slip_in_the_pattern_is_raised():
    graph = fg.trace(jnp.sin, X)
    with pytest.raises(NameError, match="sinus"):
        fg.replace(graph, lambda a: sinus(a), jnp.sin)  # noqa: F821
    with pytest.raises(AttributeError, match="sinus"):
        fg.replace(graph, lambda a: jnp.sinus(a), jnp.sin)
    with pytest.raises(RuntimeError, match="mine"):
        fg.replace(graph, lambda a: jnp.sin(a), lambda a: (_ for _ in ()).throw(RuntimeError("mine")))
    assert fg.replace(graph, lambda a: jnp.sin(a).real.at[0, 9, 9].set(1), jnp.sin).count == 0


def test_a_pattern_that_types_do_not_fit_is_not_there():
    assert fg.replace(fg.trace(jnp.sin, 1.0), lambda a: jnp.einsum("ij,jk->ik", a, a), jnp.sin).count == 0
