"""What leaves a scope: seen by a tap and replaced by a patch, as a function runs and as its Graph is traced."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.ad_checkpoint
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

from ... import checks

assert_near = functools.partial(checks.assert_near, rtol=2e-5, atol=1e-6)
X = jnp.linspace(0.1, 1.0, 4)
FORMS = ("function", "graph")
SIN = fg.op("sin")
same = lambda *values: values if len(values) > 1 else values[0]
scope = jax.named_scope


def form_of(f, form, *args):
    return fg.trace(f, *args) if form == "graph" else f


def weighted(tapped):
    """A scalar to which every element of the result, and of all that is seen, contributes."""

    def total(x):
        leaves = [v for v in jax.tree.leaves(tapped(x)) if jnp.issubdtype(v.dtype, jnp.floating)]
        return sum((jnp.sum(jnp.sin(v + k)) for k, v in enumerate(leaves)), start=jnp.float32(0))

    return total


# ------------------------------------------------------------------------------------------------ gradients seen


def layered(x):
    with scope("layer_0"):
        x = jnp.sin(x) * 2
    with scope("layer_1"):
        x = jnp.tanh(x) * 3
    return jnp.sum(x)


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_pass_lies_in_scopes_of_its_own(form):
    gradient = form_of(jax.grad(layered), form, X)
    h = jnp.sin(X) * 2
    slope = 3 * (1 - jnp.tanh(h) ** 2)
    out, seen = fg.tap(gradient, where="transpose/layer_1")(X)
    (ct,) = (v for v in seen.values() if v.shape == X.shape)
    assert_near(ct, slope)  # the cotangent of what the layer was given
    assert_near(out, jax.grad(layered)(X))
    out, seen = fg.tap(gradient, where="layer_0")(X)
    assert all(not k.startswith("transpose") for k in seen)
    assert any(np.allclose(v, h) for v in seen.values())
    out, seen = fg.tap(gradient, where="transpose")(X)
    assert_near(list(seen.values())[-1], out)
    patched = fg.patch(gradient, where="transpose/layer_1", replace=lambda ct: jnp.zeros_like(ct))
    assert_near(patched(X), jnp.zeros(4))


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_taken_in_a_scope_leaves_it(form):
    def f(x):
        with scope("update"):
            g = jax.grad(lambda x: jnp.sum(jnp.sin(x)))(x)
        return x - g

    for run in (lambda t: t, jax.jit):
        _, seen = run(fg.tap(form_of(f, form, X), where="update"))(X)
        assert list(seen) == ["update/transpose/mul#0"]
        assert_near(seen["update/transpose/mul#0"], jnp.cos(X))


def test_nested_gradients():
    f = lambda x: jnp.sum(jax.nn.relu(jnp.sin(x)) ** 3)
    slope = lambda x: jnp.sum(fg.tap(jax.grad(f), where=SIN)(x)[0])
    assert_near(jax.jit(jax.grad(slope))(X), jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(f)(x))))(X))
    seen_of = lambda x: jnp.sum(fg.tap(jax.grad(f), where=SIN)(x)[1]["sin#0"])
    assert_near(jax.jit(jax.grad(seen_of))(X), jnp.cos(X))
    hessian = jax.hessian(lambda x: jnp.sum(fg.tap(f, where=SIN)(x)[1]["sin#0"] ** 2))
    assert_near(jax.jit(hessian)(X), jnp.diag(2 * jnp.cos(2 * X)))


# ------------------------------------------------------------------------------------------------ scopes


def crossing(x):
    with scope("a"):
        y = jnp.sin(x)
        z = jnp.cos(y)  # used inside only
        w = y * z
    with scope("b"):
        v = jnp.exp(y)
    return v + w


def in_a_loop(x):
    for _ in range(2):
        with scope("a"):
            x = jnp.sin(x)
        x = x + 1
    return x


def around_a_scan(x):
    with scope("a"):
        x, ys = lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=3)
    return x + ys[0]


def inside_a_scan(x):
    def body(c, _):
        with scope("a"):
            y = jnp.sin(c)
            z = jnp.cos(y)
        return z, y

    return lax.scan(body, x, None, length=3)


def by_output_only(x):
    with scope("a"):
        y = jnp.sin(x)
    return y


def inputs_returned(x):
    with scope("a"):
        return x, x


def used_twice(x):
    with scope("a"):
        y = jnp.sin(x)
    return y + y, y


def same_scope_twice(x):
    with scope("a"):
        y = jnp.sin(x)
    with scope("a"):
        return jnp.cos(y)


def nested(x):
    with scope("a"):
        with scope("a"):
            y = jnp.sin(x)
        z = jnp.cos(y)
    return z


def in_jit(x):
    @jax.jit
    def inner(x):
        with scope("a"):
            return jnp.sin(x)

    return inner(inner(x))


def closed_over(x):
    with scope("a"):
        y = jnp.sin(x)
    z = jax.jit(lambda z: jax.jit(lambda z: z * y)(z))(x)
    return lax.scan(lambda c, _: (c + jax.jit(lambda c: c * y)(c), None), z, None, length=2)[0]


def in_a_branch(x):
    def branch(x):
        with scope("a"):
            y = jnp.sin(x)
        return y * 2

    return lax.cond(x[0] > 0, branch, jnp.cos, x)


SCOPES = {
    crossing: {"a/sin#0": jnp.sin, "a/mul#0": lambda x: jnp.sin(x) * jnp.cos(jnp.sin(x))},
    in_a_loop: {"a/sin#0": jnp.sin, "a/sin#1": lambda x: jnp.sin(jnp.sin(x) + 1)},
    around_a_scan: {
        "a/scan#0": lambda x: jnp.sin(jnp.sin(jnp.sin(x))),
        "a/scan#1": lambda x: jnp.stack([x, jnp.sin(x), jnp.sin(jnp.sin(x))]),
    },
    inside_a_scan: {"a/sin#0": lambda x: inside_a_scan(x)[1], "a/cos#0": lambda x: jnp.cos(inside_a_scan(x)[1])},
    by_output_only: {"a/sin#0": jnp.sin},
    inputs_returned: {},
    used_twice: {"a/sin#0": jnp.sin},
    same_scope_twice: {"a/cos#0": lambda x: jnp.cos(jnp.sin(x))},
    nested: {"a/cos#0": lambda x: jnp.cos(jnp.sin(x))},
    in_jit: {"a/sin#0": jnp.sin, "a/sin#1": lambda x: jnp.sin(jnp.sin(x))},
    closed_over: {"a/sin#0": jnp.sin},
    in_a_branch: {"a/sin#0": lambda x: (jnp.sin(x), jnp.bool_(True))},
}
RUN = {
    "eager": lambda tapped, x: tapped(x),
    "jit": lambda tapped, x: jax.jit(tapped)(x),
    "vmap": lambda tapped, x: jax.tree.map(lambda v: v[0], jax.vmap(tapped)(x[None])),
    "remat": lambda tapped, x: jax.checkpoint(tapped)(x),
    "vjp": lambda tapped, x: jax.vjp(tapped, x)[0],
}


def runs(functions, some):
    """Each function and form eagerly and compiled; some of the functions under the other transforms too."""
    is_quick = lambda f, run: run in ("eager", "jit") or f in some
    return [
        pytest.param(f, form, run, id=f"{f.__name__}-{form}-{run}", marks=() if is_quick(f, run) else pytest.mark.rest)
        for f, form, run in itertools.product(functions, FORMS, RUN)
    ]


@pytest.mark.parametrize(("f", "form", "run"), runs(SCOPES, [crossing, inside_a_scan]))
def test_what_leaves_a_scope(f, form, run):
    out, seen = RUN[run](fg.tap(form_of(f, form, X), where="a"), X)
    assert_near(out, f(X))
    assert list(seen) == list(SCOPES[f])
    assert_near(dict(seen), {name: value(X) for name, value in SCOPES[f].items()})


def patched_crossing(x, new):
    """As `crossing`, its `a` patched by hand: what is inside keeps its own values."""
    y = jnp.sin(x)
    return jnp.exp(new(y)) + new(y * jnp.cos(y))


def patched_closed_over(x, new):
    y = new(jnp.sin(x))
    z = x * y
    return z + z * y + (z + z * y) * y


def patched_branch(x, new):
    return lax.cond(x[0] > 0, lambda x: new(jnp.sin(x)) * 2, jnp.cos, x)


def patched_inside(x, new):
    def body(c, _):
        y = jnp.sin(c)
        return new(jnp.cos(y)), new(y)

    return lax.scan(body, x, None, length=3)


PATCHED = {
    crossing: patched_crossing,
    in_a_loop: lambda x, new: new(jnp.sin(new(jnp.sin(x)) + 1)) + 1,
    inside_a_scan: patched_inside,
    by_output_only: lambda x, new: new(jnp.sin(x)),
    used_twice: lambda x, new: (2 * new(jnp.sin(x)), new(jnp.sin(x))),
    same_scope_twice: lambda x, new: new(jnp.cos(jnp.sin(x))),
    in_jit: lambda x, new: new(jnp.sin(new(jnp.sin(x)))),
    closed_over: patched_closed_over,
    in_a_branch: patched_branch,
}


@pytest.mark.parametrize(("f", "form", "run"), runs(PATCHED, [crossing, closed_over]))
def test_what_leaves_a_scope_is_replaced(f, form, run):
    new = lambda v: v * 0.5 + 1
    patched = fg.patch(form_of(f, form, X), where="a", replace=new)
    want = lambda x: PATCHED[f](x, new)
    assert_near(RUN[run](patched, X), want(X))
    if run == "jit":
        assert_near(jax.jit(jax.grad(weighted(patched)))(X), jax.jit(jax.grad(weighted(want)))(X))


def test_one_sub_graph_called_from_two_scopes():
    inner = jax.jit(lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=2)[0])

    def f(x):
        with scope("a"):
            x = inner(x)
        with scope("b"):
            return inner(x)

    for form in FORMS:
        _, seen = fg.tap(form_of(f, form, X), where=SIN)(X)
        assert list(seen) == ["a/sin#0", "b/sin#0"]
        in_b = lambda site: site.scope == "b" and SIN(site)
        _, seen = fg.tap(form_of(f, form, X), where=in_b)(X)
        assert list(seen) == ["b/sin#0"]
        got = fg.patch(form_of(f, form, X), where=in_b, replace=lambda v: 2 * v)(X)
        assert_near(got, 2 * jnp.sin(2 * jnp.sin(inner(X))))


def test_a_scope_around_the_call_is_not_part_of_the_function():
    with scope("outside"):
        for f in (by_output_only, fg.trace(by_output_only, X)):
            assert list(fg.tap(f, where="*")(X)[1]) == ["a/sin#0"]
            assert list(fg.tap(f, where="outside")(X)[1]) == []
            assert list(jax.jit(fg.tap(f, where="*"))(X)[1]) == ["a/sin#0"]


def test_values_that_nobody_keeps_are_freed():
    """A frame knows what was made by weak references."""

    def f(x):
        with scope("a"):
            for _ in range(20):
                x = jnp.sin(x)
                sizes.append(sum(a.nbytes for a in jax.live_arrays() if a.shape == x.shape))
        return x

    sizes = []
    fg.tap(f, where="a")(jnp.ones((321, 5)))
    assert max(sizes) <= 3 * 321 * 5 * 4


returned = jax.custom_jvp(lambda x: x)
returned.defjvp(lambda primals, tangents: (returned(*primals), tangents[0]))
LAST = {
    "x[i]": lambda x: x[jnp.array([1, 0])],
    ".at[].set": lambda x: x.at[0].set(1.0),
    ".at[].add": lambda x: jnp.sin(x).at[0].add(x[1]),
    "astype": lambda x: jnp.sin(x).astype(jnp.float32),
    "a Python number": lambda x: x * 2.0,
    "gelu": jax.nn.gelu,
    "softmax": jax.nn.softmax,
    "where": lambda x: jnp.where(x > 0.5, x, 0.0),
    "floor": lambda x: jnp.floor(x) + x,
    "norm": lambda x: x / jnp.linalg.norm(x),
    "sort": jnp.sort,
    "cumsum": jnp.cumsum,
    "tril": lambda x: jnp.tril(jnp.outer(x, x)),
    "einsum": lambda x: jnp.einsum("i,j->ij", x, x),
    "modulo": lambda x: x % 0.3,
    "update": lambda x: lax.dynamic_update_slice(x, x[:1], (1,)),
    "segments": lambda x: jax.ops.segment_sum(x, jnp.array([0, 0, 1, 1]), 2),
    "nothing": lambda x: x,
    "squeeze that does nothing": lambda x: jnp.squeeze(jnp.sin(x)),
    "squeeze of an input": jnp.squeeze,
    "real of an input": jnp.real,
    "plus": lambda x: +x,
    "stop_gradient": lambda x: lax.stop_gradient(jnp.sin(x)),
    "stop_gradient of an input": lax.stop_gradient,
    "checkpoint_name": lambda x: jax.ad_checkpoint.checkpoint_name(x, "kept"),
    "device_put": lambda x: jax.device_put(jnp.sin(x)),
    "an input of a function with a rule": lambda x: returned(jnp.sin(x)),
    "a key": lambda x: jax.random.uniform(lax.stop_gradient(jax.random.key(0)), x.shape) * x,
    "an input of jit": lambda x: jax.jit(lambda x: (x, jnp.sin(x)))(x)[0],
}
DERIVATIVES = {"f": lambda f: f, "grad": jax.grad, "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))}


SAMPLE = {
    *((op, "f") for op in LAST),
    *itertools.product(
        ("x[i]", "a Python number", "where", "nothing", "an input of a function with a rule"), DERIVATIVES
    ),
}


@pytest.mark.parametrize(
    ("op", "derivative"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow)
        for case in itertools.product(LAST, DERIVATIVES)
    ],
)
def test_what_ends_a_scope_as_it_runs_and_as_it_is_traced(op, derivative):
    def f(x):
        with scope("a"):
            y = LAST[op](x)
        return jnp.sum(y * y) + jnp.sum(jnp.squeeze(y))

    f = DERIVATIVES[derivative](f)
    graph = fg.trace(f, X)
    for where in ("a", "transpose/a"):
        (_, seen), (_, want) = (fg.tap(g, where=where)(X) for g in (f, graph))
        assert list(seen) == list(want)
        assert_near(dict(seen), dict(want))
        if want:
            assert_near(*(fg.patch(g, where=where, replace=lambda v: v + v)(X) for g in (f, graph)))
        else:
            for form in FORMS:
                with pytest.raises(fg.OptionError):
                    fg.patch(form_of(f, form, X), where=where, replace=same)(X)


def test_forwarded_and_repeated_values():
    def f(x):
        with scope("a"):
            same_x, y, z = jax.jit(lambda x: (x, jnp.sin(x), jnp.sin(x)))(x)
        return same_x + y + z, y

    for form in FORMS:
        tapped = fg.tap(form_of(f, form, X), where="a")
        names = list(jax.jit(tapped)(X)[1])
        assert [n for n in names if "sin" in n] == ["a/sin#0", "a/sin#1"]
        assert_near(tapped(X)[0], f(X))


@pytest.mark.parametrize("where", ["a", SIN])
def test_python_numbers_and_functions_that_return_them(where):
    @jax.custom_jvp
    def number(x):
        return 1.0

    number.defjvp(lambda primals, tangents: (number(*primals), 0.0 * tangents[0]))

    def f(x):
        with scope("a"):
            y = number(x)
        return y * jnp.sin(x)

    assert_near(fg.tap(f, where=where)(1.0)[0], f(1.0))


def test_errors_name_the_line_of_this_function_not_of_who_called_jnp_first():
    x = jnp.ones((2, 7))  # of no other test: this is the first call of jnp.arctan for it
    fg.replace(fg.trace(lambda x: jnp.sinh(x), x), jnp.sinh, lambda x: jnp.arctan(x) + 1)

    def f(x):
        with scope("a"):
            y = jnp.arctan(x)
        return y + 1

    by_scope = fg.patch(f, where="a", replace="zero")
    by_primitive = fg.patch(f, where=fg.op("atan"), replace="zero")
    by_rule = fg.live(f, {lax.atan_p: lambda eqn, x: x[0]})
    for edited in (by_scope, by_primitive, by_rule):
        with pytest.raises(fg.GraphError) as e:
            edited(x)
        assert re.search(rf"  at      {re.escape(__file__)}:\d+ \(.*f\)", str(e.value))
