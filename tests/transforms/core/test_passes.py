"""Both drivers with a rule at work: `live` on functions and `interpret` on graphs, at every depth and under every transform."""

from __future__ import annotations

import gc
import itertools
import threading

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax, subjaxprs
from jax import lax
from jax.extend.core.primitives import call_p, closed_call_p
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ...checks import counted_compilations
from ...test_jax_contracts import on_the_host

X = jnp.linspace(0.1, 1.0, 4)
SCALE = jnp.float32(1.3)
MESH = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])
CONSTANT = np.linspace(0, 1, 4, dtype=np.float32)


def doubled(eqn, x):
    return 2 * lax.sin(x)


RULES = fg.Rules("doubled", {lax.sin_p: doubled})


def holders(sin):
    """One program for each primitive that holds a sub-graph; `sin` is the work for the rule."""

    @jax.custom_vjp
    def with_vjp(x):
        return sin(x)

    with_vjp.defvjp(lambda x: (sin(x), x), lambda x, ct: (ct * sin(x) * 2,))

    @jax.custom_jvp
    def with_jvp(x):
        return sin(x)

    with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0] * sin(primals[0])))

    def solve(x):
        invert = lambda mv, b: b / sin(jnp.float32(2))
        return lax.custom_linear_solve(lambda v: v * sin(jnp.float32(2)), x, invert, invert)

    def shards(x):
        body = lambda y: lax.psum(sin(y), "i") * sin(y)
        return jax.shard_map(body, mesh=MESH, in_specs=P("i"), out_specs=P("i"))(x)

    def call(primitive, x):
        jaxpr, closed_over, _ = subjaxprs.lifted(jax.make_jaxpr(sin)(x))
        jaxpr = jaxpr.jaxpr if primitive is call_p else jaxpr  # open on JAX 0.10; since then the two are one
        return _jax.bind(primitive, {"call_jaxpr": jaxpr}, [*closed_over, x])[0]

    def nested(x):
        leaf = lambda z: lax.cond(z[0] > 0, with_vjp, lambda q: -q, z)
        return jax.jit(lambda y: lax.scan(lambda c, _: (jax.checkpoint(leaf)(c), None), y, None, length=2)[0])(x)

    return {
        "plain": sin,
        "jit": lambda x: jax.jit(lambda y: sin(y) + CONSTANT)(x),
        "scan": lambda x: lax.scan(lambda c, a: (sin(c) * a + CONSTANT, c), x, jnp.arange(3.0)),
        "while": lambda x: lax.while_loop(
            lambda s: s[0] + 0 * sin(s[1]).sum() < 3, lambda s: (s[0] + 1, sin(s[1]) * x), (jnp.float32(0), x)
        ),
        "cond": lambda x: lax.switch(jnp.int32(x[0] > 0), [jnp.cos, lambda a: sin(a) * 2], x),
        "remat": lambda x: jax.checkpoint(lambda a: sin(a) * CONSTANT)(x),
        "custom_vjp": with_vjp,
        "custom_jvp": with_jvp,
        "custom_linear_solve": solve,
        "shard_map": shards,
        "compute_on": on_the_host(lambda x: sin(x) * CONSTANT),
        "closed_call": lambda x: call(closed_call_p, x),
        "call": lambda x: call(call_p, x),
        "nested": nested,
    }


def summed(f):
    return lambda *args: sum(jnp.sum(x) for x in jax.tree.leaves(f(*args)))


UNDER = {
    "eager": lambda f: f(SCALE, X),
    "jit of grad": lambda f: jax.jit(jax.grad(summed(f), (0, 1)))(SCALE, X),
    "jvp": lambda f: jax.jvp(f, (SCALE, X), (SCALE, X)),
    "vmap": lambda f: jax.vmap(f, (0, None))(jnp.stack([SCALE, SCALE / 2]), X),
}


def is_quick(driver, holder, under):
    """Each holder by both drivers eagerly or in a compiled gradient; some of them under all transforms."""
    return under == ("jit of grad" if driver == "live" else "eager") or holder in ("cond", "custom_vjp", "custom_jvp")


CASES = list(itertools.product(["live", "interpret"], holders(lax.sin), UNDER))


@pytest.mark.parametrize(
    ("driver", "holder", "under"),
    [pytest.param(*case, marks=() if is_quick(*case) else pytest.mark.rest) for case in CASES],
)
def test_a_rule_that_closes_over_a_traced_value_is_applied_at_every_depth(driver, holder, under):
    program = holders(lax.sin)[holder]

    def by_rule(scale, x):
        rules = fg.Rules("scaled", {lax.sin_p: lambda eqn, v: lax.sin(v) * scale})
        if driver == "live":
            return fg.live(program, rules)(x)
        graph = fg.trace(program, x)
        return jax.tree.unflatten(graph.out_tree, fg.interpret(graph, rules, x))

    by_hand = lambda scale, x: holders(lambda v: lax.sin(v) * scale)[holder](x)
    try:
        want = UNDER[under](by_hand)
    except (
        Exception
    ) as e:  # where JAX refuses (reverse mode of while, closing over a tracer in a custom rule), so do we
        with pytest.raises(type(e)):
            UNDER[under](by_rule)
        return
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), UNDER[under](by_rule), want)


@jax.custom_batching.custom_vmap
def batched_by_hand(x):
    return lax.sin(x)


batched_by_hand.def_vmap(lambda size, is_batched, x: (lax.sin(x) * 100, is_batched[0]))


@pytest.mark.parametrize("f", [batched_by_hand, lambda x: lax.composite(lax.sin, "test.sin")(x)])
def test_a_body_that_is_rewritten_stands_in_place_of_its_composite_or_batching_rule(f):
    for run in (fg.live(f, RULES), fg.rewrite(fg.trace(f, X[0]), RULES)):
        assert run(X[0]) == 2 * jnp.sin(X[0])
        np.testing.assert_array_equal(jax.vmap(run)(X), 2 * jnp.sin(X))
        np.testing.assert_allclose(jax.grad(run)(X[0]), 2 * jnp.cos(X[0]), rtol=1e-6)
    untouched = fg.live(f, fg.Rules("cosine", {lax.cos_p: doubled}))
    assert untouched(X[0]) == f(X[0])
    if f is batched_by_hand:
        np.testing.assert_array_equal(jax.vmap(untouched)(X), 100 * jnp.sin(X))


def test_a_wrong_rule_for_what_jnp_holds_is_named_at_the_line_that_calls_it():
    wrong = {lax.round_p: lambda eqn, x, **_: x.sum()}
    with pytest.raises(fg.GraphError) as e:
        fg.live(lambda x: jnp.round(x), wrong)(X)
    assert f"at      {__file__}:" in str(e.value)


def test_rules_of_a_graph_that_was_traced_with_64_bits_in_part():
    def f(x):
        with jax.enable_x64(True):
            return lax.convert_element_type(lax.sin(lax.convert_element_type(x, jnp.float64)), jnp.float32)

    for run in (fg.live(f, RULES), fg.rewrite(fg.trace(f, X), RULES)):
        np.testing.assert_allclose(run(X), 2 * jnp.sin(X), rtol=1e-6)


def test_an_empty_table_gives_the_function_itself():
    f = lambda x: x
    assert fg.live(f, fg.Rules("nothing")) is f


def test_python_runs_as_it_is(capsys):
    state = []

    def f(x, mode):
        print("running")
        state.append(mode)
        return jnp.sin(x) if x > 0 else x

    f = fg.live(f, RULES)
    assert float(f(jnp.float32(1.0), "a")) == pytest.approx(2 * np.sin(1.0))
    assert float(f(jnp.float32(-1.0), "b")) == -1
    assert float(jax.grad(f)(1.0, "c")) == pytest.approx(2 * np.cos(1.0))
    assert state == ["a", "b", "c"]
    assert capsys.readouterr().out == "running\n" * 3


def test_values_are_plain_arrays_while_the_function_runs():
    seen = []
    fg.live(lambda x: seen.append(jnp.sin(x)), RULES)(1.0)
    assert isinstance(seen[0], jax.Array)
    assert not isinstance(seen[0], jax.core.Tracer)


def test_a_rule_does_not_see_its_own_work():
    rules = fg.Rules("again", {lax.sin_p: lambda eqn, x: lax.sin(lax.sin(x))})
    assert float(fg.live(lax.sin, rules)(1.0)) == pytest.approx(np.sin(np.sin(1.0)))


def test_live_functions_nest():
    cosine = fg.Rules("cosine", {lax.sin_p: lambda eqn, x: lax.cos(x)})
    f = fg.live(lambda x: fg.live(lax.sin, RULES)(x) + lax.sin(x), cosine)
    assert float(f(1.0)) == pytest.approx(3 * np.cos(1.0))


@pytest.mark.parametrize(
    ("holder", "rule"),
    [
        *((holder, "plain") for holder in ("jit", "scan", "while", "cond", "remat", "closed_call", "nested")),
        ("custom_linear_solve", "with a constant"),
        ("scan", "with a constant"),
    ],
)
def test_a_rewritten_sub_graph_is_compiled_once(holder, rule):
    table = jnp.float32([3.0])[0] if rule == "with a constant" else 2
    rules = fg.Rules("scaled", {lax.sin_p: lambda eqn, x: lax.sin(x) * table})
    program = holders(lax.sin)[holder]
    inner = jax.jit(program)  # one function object, so that only what we make anew is compiled anew
    f, in_jit = fg.live(program, rules), fg.live(inner, rules)
    f(X), in_jit(X)
    with counted_compilations() as compilations:
        fg.live(inner, rules)(X)
        assert not compilations
        program(X)  # what JAX itself compiles again at each call, for a closure made anew
        by_jax = len(compilations)
        f(X)
        assert len(compilations) - by_jax <= by_jax


@jax.custom_jvp
def slope_by_jvp(x):
    return 2 * x


slope_by_jvp.defjvp(lambda primals, tangents: (2 * primals[0], tangents[0] * lax.sin(primals[0])))


@jax.custom_vjp
def slope_by_vjp(x):
    return 2 * x


slope_by_vjp.defvjp(lambda x: (2 * x, lax.sin(x)), lambda sine, ct: (ct * sine,))


@jax.custom_vjp
def slope_backward(x):
    return 2 * x


slope_backward.defvjp(lambda x: (2 * x, x), lambda x, ct: (ct * lax.sin(x),))


@pytest.mark.parametrize("wrap", ["plain", "jit", "scan", "remat"])
@pytest.mark.parametrize("f", [slope_by_jvp, slope_by_vjp, slope_backward])
def test_rules_reach_derivative_rules_whose_function_holds_no_work(f, wrap):
    wrapped = {
        "plain": f,
        "jit": jax.jit(f),
        "scan": lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0],
        "remat": jax.checkpoint(f),
    }[wrap]
    want = pytest.approx(2 * np.sin(1.0))
    assert float(jax.grad(fg.live(wrapped, RULES))(1.0)) == want
    assert float(jax.jit(jax.grad(fg.live(wrapped, RULES)))(1.0)) == want
    assert float(jax.grad(fg.rewrite(fg.trace(wrapped, 1.0), RULES))(1.0)) == want


@pytest.mark.parametrize(
    "context",
    [jax.checking_leaks, jax.disable_jit, pytest.param(jax.enable_checks, marks=pytest.mark.slow), jax.debug_nans],
)
def test_contexts(context):
    program = holders(lax.sin)["nested"]
    by_hand = holders(lambda v: 2 * lax.sin(v))["nested"]
    with context(True) if context is not jax.checking_leaks else context():
        got = jax.jit(jax.grad(summed(fg.live(program, RULES))))(X)
        want = jax.jit(jax.grad(summed(by_hand)))(X)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_threads_do_not_see_each_others_rules():
    results = {}
    barrier = threading.Barrier(4)

    def run(k):
        rules = fg.Rules("scaled", {lax.sin_p: lambda eqn, x: lax.sin(x) * k})
        f = fg.live(lambda x: (barrier.wait(), lax.sin(x))[1], rules)
        results[k] = float(jax.grad(f)(1.0))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {k: pytest.approx(k * np.cos(1.0)) for k in range(4)}


def test_an_error_of_the_function_leaves_no_trace_behind():
    with pytest.raises(ZeroDivisionError):
        fg.live(lambda x: 1 / 0, RULES)(1.0)
    assert float(lax.sin(1.0)) == pytest.approx(np.sin(1.0))


def test_a_second_rule_for_a_primitive_raises():
    rules = fg.Rules("mine")
    rules(lax.sin_p, lax.cos_p)(doubled)
    with pytest.raises(fg.DuplicateRule, match="mine already has a rule for primitive 'cos'"):
        rules(lax.cos_p)(doubled)


def test_a_rule_entered_later_is_found():
    rules = fg.Rules("growing", {lax.cos_p: lambda eqn, x: x})
    f = fg.live(jax.jit(lax.sin), rules)
    assert float(f(1.0)) == pytest.approx(np.sin(1.0))
    rules(lax.sin_p)(doubled)
    assert float(f(1.0)) == pytest.approx(2 * np.sin(1.0))


@pytest.mark.parametrize("count", [40, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("verb", ["grad", "grad with rules", "vmap", "trace", "grad of a Graph"])
def test_wrappers_of_fresh_functions_leave_memory_stable(verb, count):
    wrap = {
        "grad": lambda f: fg.grad(f)(1.0),
        "grad with rules": lambda f: fg.grad(f, rules=RULES)(1.0),
        "vmap": lambda f: fg.vmap(f)(X),
        "trace": lambda f: fg.trace(f, 1.0),
        "grad of a Graph": lambda f: fg.grad(fg.trace(f, 1.0)),
    }[verb]

    def objects_after(n):
        for k in range(n):
            wrap(lambda x, k=k: jnp.sin(x) * k)
        gc.collect()
        return len(gc.get_objects())

    objects_after(10)
    assert objects_after(count) - objects_after(10) < 40
