"""What a scope pattern and a predicate select."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from funcgrad.transforms.core.scope_paths import entered, is_within, joined
from jax import lax

import funcgrad as fg

X = jnp.linspace(0.1, 1.0, 3)


@pytest.mark.parametrize(
    ("pattern", "path", "scope"),
    [
        ("a", "a", "a"),
        ("a", "a/b", "a"),
        ("b", "a/b", "a/b"),
        ("b", "a/bc", None),
        ("b*", "a/bc", "a/bc"),
        ("*", "a/b", "a"),
        ("a/b", "a/b/c", "a/b"),
        ("a/b", "x/a/b/c", "x/a/b"),
        ("a/b", "a/x/b", None),
        ("a/*/b", "a/x/b", "a/x/b"),
        ("/a/b/", "a/b", "a/b"),
        ("block_?/attention", "model/block_3/attention/softmax", "model/block_3/attention"),
        ("block_[01]", "block_2", None),
        ("a", "a/a/a", "a"),  # the outermost
        ("A", "a", None),
        ("a", "", None),
        ("a", "transpose/a", None),
        ("*", "transpose/a", None),
        ("transpose", "transpose/a", "transpose"),
        ("transpose", "a", None),
        ("transpose/a", "transpose/a/b", "transpose/a"),
        ("transpose/b", "transpose/a/b", "transpose/a/b"),
        ("transpose/b", "a/b", None),
        ("a", "a/transpose/b", "a"),  # a gradient that is taken in a scope lies in it
        ("b", "a/transpose/b", None),
        ("transpose/b", "a/transpose/b", "a/transpose/b"),
    ],
)
def test_patterns(pattern, path, scope):
    split = lambda text: tuple(text.split("/")) if text else ()
    assert entered(pattern, split(path)) == (None if scope is None else split(scope))


def test_paths():
    assert joined(("a",), ("b", "c")) == ("a", "b", "c")
    assert joined(("transpose", "a"), ("transpose", "b")) == ("transpose", "a", "b")
    assert joined(("a",), ("transpose", "b")) == ("a", "transpose", "b")
    assert is_within(("a", "b"), ("a",))
    assert not is_within(("a",), ("a", "b"))


def sites(f, *args):
    """Every site of a program, as a predicate is asked."""
    visited = []
    fg.tap(fg.trace(f, *args), where=lambda site: visited.append(site))
    return visited


def scoped(x):
    with jax.named_scope("outer"), jax.named_scope("in/ner"):
        return jax.jit(lambda x: lax.scan(lambda c, _: (lax.sin(c), None), x, None, length=2)[0])(x)


def test_a_site_says_what_the_equation_is():
    site = next(s for s in sites(scoped, X) if s.primitive.name == "sin")
    assert site.scope == "outer/in/ner"
    assert site.in_avals == site.out_avals == (jax.typeof(X),)
    assert site.params == {"accuracy": None}
    assert {s.primitive.name for s in sites(scoped, X)} == {"jit", "scan", "sin"}


def test_a_predicate_is_not_asked_about_what_returns_no_arrays():
    def f(x):
        jax.debug.print("{}", x)
        total = jax.new_ref(x)
        total[...] = 2 * x
        return total[...]

    assert [s.primitive.name for s in sites(f, X)] == ["mul", "swap", "get"]


def test_names_of_the_scopes_of_a_gradient():
    def f(x):
        with jax.named_scope("outer"):
            g = jax.grad(lambda x: jnp.sum(jax.named_call(jnp.sin, name="inner")(x)))
            return g(x)

    scopes = lambda f: {s.scope for s in sites(f, X)}
    assert scopes(f) == {"outer", "outer/inner", "outer/transpose", "outer/transpose/inner"}
    assert scopes(jax.grad(lambda x: jnp.sum(scoped(x)))) >= {"outer/in/ner", "transpose", "transpose/outer/in/ner"}


@pytest.mark.parametrize("chosen", ["tanh", lax.tanh_p])
def test_op(chosen):
    names = lambda f, where: list(fg.tap(f, where=where)(X)[1])
    f = lambda x: jnp.tanh(x) + jnp.sin(x)
    assert names(f, fg.op(chosen)) == ["tanh#0"]
    assert names(f, fg.op(chosen, "sin")) == ["tanh#0", "sin#0"]
    assert names(f, fg.op("cos")) == []
    assert names(f, lambda site: fg.op("add")(site) and site.scope == "") == ["add#0"]


@pytest.mark.parametrize(
    ("primitives", "message"),
    [
        ((), "op takes primitives or their names, and got nothing."),
        ((lax.tanh_p, 3), "op takes primitives or their names, and got tanh, 3."),
        ((jnp.tanh,), "op takes primitives or their names, and got <PjitFunction of <function tanh at"),
    ],
)
def test_op_of_what_is_no_primitive(primitives, message):
    with pytest.raises(fg.ArgumentError, match="^" + re.escape(message)) as e:
        fg.op(*primitives)
    assert str(e.value).endswith(
        '  try     fg.op("tanh") or fg.op(jax.lax.tanh_p); fg.walk(graph) shows those of a graph'
    )


@pytest.mark.parametrize("verb", ["tap", "patch"])
@pytest.mark.parametrize("where", [None, "", "/", 3, lax.tanh_p, ["a"]])
def test_where_is_a_pattern_or_a_predicate(verb, where):
    options = {"replace": 0.0} if verb == "patch" else {}
    with pytest.raises(fg.ArgumentError) as e:
        getattr(fg, verb)(jnp.sin, where=where, **options)
    assert str(e.value) == (
        f"{verb} selects by a scope pattern or a predicate, and got {where!r}.\n"
        '  try     where="block_*/attention", where=fg.op("tanh"), or where=lambda site: "block" in site.scope'
    )
    assert isinstance(e.value, TypeError)


def test_a_shared_sub_graph_is_searched_once():
    sites, body = [], jax.jit(lambda x: lax.cos(lax.sin(x)))

    def where(site):
        sites.append(site.primitive.name)

    _, seen = fg.tap(lambda x: body(body(body(x))), where=where)(X)
    assert not seen
    assert sites.count("sin") == sites.count("cos") == 1
