"""`trace` and `Graph`: what a graph holds, how it is called, how it reads."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ...sampling import sampled

PARAMS = {"dense_0": {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}}
X = jnp.ones((2, 3))


def loss(params, x, *, scale=1.0):
    with jax.named_scope("dense_0"):
        h = jnp.tanh(x @ params["dense_0"]["w"] + params["dense_0"]["b"])
    return scale * jnp.mean(h)


def test_a_graph_is_a_value():
    graph = fg.trace(loss, PARAMS, X)
    assert graph.name == graph.__name__ == "loss"
    assert graph.paths == ("params['dense_0']['b']", "params['dense_0']['w']", "x")
    assert [a.shape for a in graph.in_avals] == [(4,), (3, 4), (2, 3)]
    assert [a.shape for a in graph.out_avals] == [()]
    assert len({graph, graph, fg.trace(loss, PARAMS, X)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.name = "other"


def test_calls_bind_as_the_function_did():
    graph = fg.trace(loss, PARAMS, x=X, scale=2.0)
    want = loss(PARAMS, X, scale=2.0)
    for got in (graph(PARAMS, X, scale=2.0), graph(PARAMS, x=X, scale=2.0), graph(x=X, scale=2.0, params=PARAMS)):
        assert got == want
    variadic = fg.trace(lambda *xs, **named: sum(xs) + named["k"], 1.0, 2.0, k=3.0)
    assert variadic(1.0, 2.0, k=4.0) == 7
    assert variadic.paths == ("xs[0]", "xs[1]", "k")


def test_static_arguments_are_left_out():
    def power(x, n, mode="sum", *, scale=1.0):
        y = x**n * scale
        return y.sum() if mode == "sum" else y

    by_number = fg.trace(power, X, 3, static_argnums=1)
    assert by_number(X) == power(X, 3)
    by_name = fg.trace(power, X, n=2, mode="all", static_argnames=("n", "mode"))
    np.testing.assert_array_equal(by_name(x=X), power(X, 2, "all"))
    mixed = fg.trace(power, X, 2, "all", scale=3.0, static_argnums=(1, -1))
    np.testing.assert_array_equal(mixed(X, scale=5.0), power(X, 2, "all", scale=5.0))
    assert mixed.paths == ("x", "scale")
    with pytest.raises(TypeError):
        by_number(X, 3)


def takes(a, b, c=30.0, *rest, d=40.0, e=50.0):
    return jnp.stack([jnp.asarray(v, jnp.float32) for v in (a, b, c, sum(rest), d, e)])


@pytest.mark.parametrize("static", [("b",), ("c",), ("a", "d"), ("b", "c", "e"), ("e",), (1,), (0, -1), (3,), (4, 3)])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1.0, 2.0, 3.0, 4.0, 5.0), {"e": 6.0}),
        ((1.0, 2.0), {"c": 3.0}),
        ((1.0,), {"b": 2.0, "d": 3.0}),
        ((), {"b": 2.0, "a": 1.0, "e": 3.0, "d": 4.0}),
        ((1.0, 2.0), {"e": 6.0}),
    ],
)
def test_static_arguments_by_place_and_by_name(static, args, kwargs):
    numbers = [k for k in static if isinstance(k, int)]
    names = [n for n in static if isinstance(n, str)]
    if any(not -len(args) <= k < len(args) for k in numbers):
        return
    graph = fg.trace(takes, *args, static_argnums=numbers, static_argnames=names, **kwargs)
    left_out = {k % len(args) for k in numbers} | {"abc".index(n) for n in names if n in "abc"}
    by_name = {**dict(zip("abc", args, strict=False)), **kwargs}
    dynamic = {n: v for n, v in by_name.items() if n not in names and ("abcde".index(n) not in left_out or n in "de")}
    if len(args) <= 3:
        got = graph(**dynamic)
    else:
        got = graph(
            *(v for k, v in enumerate(args) if k not in left_out), **{n: v for n, v in kwargs.items() if n in dynamic}
        )
    np.testing.assert_array_equal(got, takes(*args, **kwargs))


def test_static_options_that_fit_nothing():
    with pytest.raises(ValueError, match="takes has no argument 7 to be static"):
        fg.trace(takes, 1.0, 2.0, static_argnums=7)
    with pytest.raises(ValueError, match="takes has no argument 'zz' to be static"):
        fg.trace(takes, 1.0, 2.0, static_argnames="zz")


def test_arguments_may_have_any_name():
    graph = fg.trace(lambda f, self, args: f * self + args, f=2.0, self=3.0, args=4.0)
    assert graph(f=2.0, self=3.0, args=4.0) == 10


def test_outputs_that_are_no_arrays_are_named():
    with pytest.raises(TypeError) as e:
        fg.trace(lambda x: (x, {"a": "text"}), 1.0)
    assert str(e.value) == (
        "<lambda> returned str at [1]['a'], which is not an array.\n"
        "  inputs  'text'\n"
        "  try     return arrays, in any tree; None is an empty one"
    )


def test_a_graph_of_a_graph_keeps_its_paths():
    graph = fg.trace(fg.trace(loss, PARAMS, X), PARAMS, x=X)
    assert graph.name == "loss"
    assert graph.paths == ("params['dense_0']['b']", "params['dense_0']['w']", "x")


def test_variables_are_not_named_as_inputs_are():
    text = str(fg.trace(lambda a, c: lax.sin(a) * c + lax.cos(c) * a, X, X))
    assert text.splitlines()[1:] == [
        "  b:f32[2,3] = sin a",
        "  d:f32[2,3] = mul b c",
        "  e:f32[2,3] = cos c",
        "  f:f32[2,3] = mul e a",
        "  g:f32[2,3] = add d f",
        "  return g",
    ]


def test_parameters_of_zero_are_shown():
    text = str(fg.trace(lambda x: (x.sum(0), lax.slice(x, (0, 0), (1, 1)), jnp.argmax(x, 0)), X))
    assert "reduce_sum[axes=(0,)]" in text
    assert "start_indices=(0, 0)" in text
    assert "axes=(0,)" in text.split("argmax")[1]
    assert "int64" not in str(fg.grad(fg.trace(lambda x: x[0:1].sum(), X)))


def test_shapes_alone_suffice():
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X))
    graph = fg.trace(loss, *spec)
    assert graph(PARAMS, X) == loss(PARAMS, X)


def test_weak_types_are_those_of_the_trace():
    weak, strong = fg.trace(lambda x: x + 1, 1.0), fg.trace(lambda x: x + 1, jnp.float32(1))
    assert weak(jnp.float32(1)).weak_type
    assert weak(1.0).weak_type
    assert not strong(1.0).weak_type


def test_closed_over_arrays_are_constants_and_tracers_stay():
    table = np.arange(12.0, dtype=np.float32)
    graph = fg.trace(lambda x: x * table, 2.0)
    np.testing.assert_array_equal(graph(3.0), 3 * table)

    def outer(y):
        inner = fg.trace(lambda x: x * y, 2.0)
        return fg.grad(inner)(3.0) + inner(5.0)

    assert outer(7.0) == jax.jit(outer)(7.0) == 42
    assert jax.grad(outer)(7.0) == 6
    np.testing.assert_array_equal(jax.vmap(outer)(jnp.arange(3.0)), 6 * jnp.arange(3.0))


def test_each_trace_runs_the_function_again():
    scale = [2.0]
    f = lambda x: x * scale[0]
    before, scale[0] = fg.trace(f, 1.0), 5.0
    assert (before(1.0), fg.trace(f, 1.0)(1.0)) == (2, 5)


def test_a_graph_is_a_function_to_every_transform_of_jax():
    graph = fg.trace(loss, PARAMS, X)
    assert jax.jit(graph)(PARAMS, X) == jax.jit(loss)(PARAMS, X)
    xs = jnp.stack([X, 2 * X])
    np.testing.assert_array_equal(jax.vmap(graph, (None, 0))(PARAMS, xs), jax.vmap(loss, (None, 0))(PARAMS, xs))
    jax.tree.map(np.testing.assert_array_equal, jax.grad(graph)(PARAMS, X), jax.grad(loss)(PARAMS, X))
    np.testing.assert_array_equal(jax.jvp(graph, (PARAMS, X), (PARAMS, X)), jax.jvp(loss, (PARAMS, X), (PARAMS, X)))
    assert lax.map(functools.partial(graph, PARAMS), xs).shape == (2,)
    mesh = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])
    rows = fg.trace(jnp.sin, jax.ShapeDtypeStruct((2,), jnp.float32))
    mapped = jax.shard_map(rows, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    np.testing.assert_array_equal(mapped(jnp.arange(8.0)), jnp.sin(jnp.arange(8.0)))
    assert fg.trace(graph, PARAMS, X)(PARAMS, X) == graph(PARAMS, X)


SHARDED = {
    "literals": lambda w, x: jnp.sin(x) * 2 + w * np.float32([0.5, 1.5]),
    "jit": lambda w, x: jax.jit(lambda y: jnp.sin(y) * 2 * w)(x),
    "custom_jvp": lambda w, x: jax.nn.relu(x * w) - jax.nn.silu(x),
    "scan": lambda w, x: lax.scan(lambda c, a: (c * a, c), w * x[0], x)[1],
    "fori_loop": lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) * w, x),
    "cond": lambda w, x: lax.cond(w > 0, lambda y: y * w, lambda y: jnp.zeros_like(y) + 1, x),
    "remat": lambda w, x: jax.checkpoint(lambda y: jnp.sin(y) * w)(x),
    "solve": lambda w, x: jnp.linalg.solve(jnp.eye(2) * w, x),
}


@pytest.mark.parametrize("name", sampled(SHARDED, ["literals", "jit", "custom_jvp", "scan", "cond"]))
def test_a_graph_inside_a_shard_map_that_it_does_not_know(name):
    f, w, x = SHARDED[name], jnp.float32(1.3), jnp.linspace(0.1, 1.0, 8)
    mesh = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])
    mapped = lambda h, out=P("i"): jax.shard_map(h, mesh=mesh, in_specs=(P(), P("i")), out_specs=out)
    graph = fg.trace(f, w, x[:2])
    np.testing.assert_allclose(jax.jit(mapped(graph))(w, x), jax.jit(mapped(f))(w, x), rtol=1e-6)
    slope = lambda h: jax.jit(jax.grad(lambda w, x: jnp.sum(mapped(h)(w, x)), (0, 1)))(w, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), slope(graph), slope(f))
    summed = lambda h: lambda w, x: lax.psum(jnp.sum(h(w, x)), "i")
    inner = lambda h: jax.jit(mapped(jax.grad(summed(h), (0, 1)), (P(), P("i"))))(w, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), inner(graph), inner(f))
    with pytest.raises(ValueError, match="out_specs"):  # the shards differ, and JAX sees it
        mapped(graph, P())(w, x)


def test_functions_of_every_kind():
    class Model:
        def __call__(self, x):
            return x * 2

        def method(self, x):
            return x * 3

    assert fg.trace(Model(), 1.0)(1.0) == 2
    assert fg.trace(Model().method, 1.0)(1.0) == 3
    assert fg.trace(functools.partial(jnp.multiply, 4.0), 1.0)(1.0) == 4
    assert fg.trace(jax.jit(lambda x: x * 5), 1.0)(1.0) == 5


def test_results_of_every_kind():
    graph = fg.trace(lambda x: {"a": (x, None), "b": [1.0, np.int32(2)]}, 3.0)
    got = graph(3.0)
    assert jax.tree.structure(got) == jax.tree.structure({"a": (0, None), "b": [0, 0]})
    assert fg.trace(lambda: None)() is None
    assert fg.trace(lambda x: x, jax.random.key(0))(jax.random.key(1)) == jax.random.key(1)


WRONG = {
    "shape": (
        lambda g: g(PARAMS, jnp.ones((2, 5))),
        "loss takes x of type float32[2,3], and got float32[2,5].\n"
        "  try     pass float32[2,3], or trace loss again with such an argument",
    ),
    "dtype": (
        lambda g: g(PARAMS, jnp.ones((2, 3), jnp.int32)),
        "loss takes x of type float32[2,3], and got int32[2,3].\n"
        "  try     pass float32[2,3], or trace loss again with such an argument",
    ),
    "no array": (
        lambda g: g(PARAMS, "x"),
        "loss takes x of type float32[2,3], and got str.\n  try     pass float32[2,3], or trace loss again with such an argument",
    ),
    "tree": (
        lambda g: g({"dense_0": {"w": PARAMS["dense_0"]["w"], "bias": 1.0}}, X),
        "loss was traced with other arguments: missing params['dense_0']['b']; unknown params['dense_0']['bias'].\n"
        "  inputs  params['dense_0']['bias']: float32[], params['dense_0']['w']: float32[3,4], x: float32[2,3]\n"
        "  try     call it as loss(params, x), or trace it again with these arguments",
    ),
    "missing": (
        lambda g: g(PARAMS),
        "loss was traced with other arguments: missing x.\n"
        "  inputs  params['dense_0']['b']: float32[4], params['dense_0']['w']: float32[3,4]\n"
        "  try     call it as loss(params, x), or trace it again with these arguments",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    call, message = WRONG[case]
    with pytest.raises(TypeError) as e:
        call(fg.trace(loss, PARAMS, X))
    assert str(e.value) == message
    assert isinstance(e.value, fg.ArgumentError)


def test_what_cannot_be_traced_is_named():
    with pytest.raises(TypeError) as e:
        fg.trace(loss, {"a": "text"}, X)
    assert str(e.value) == (
        "loss cannot be traced with params['a'] of type str, which is not an array.\n"
        "  inputs  params['a'] = 'text'\n"
        "  try     close over it, or leave it out: only arrays can stand in params"
    )
    with pytest.raises(TypeError, match=r"name it static: .*static_argnames='x'"):
        fg.trace(loss, {}, "text")
    with pytest.raises(TypeError, match="the static argument params of loss is not hashable: dict"):
        fg.trace(loss, {}, X, static_argnums=0)


def test_text():
    def f(params, x):
        with jax.named_scope("dense_0"):
            h = lax.sin(lax.dot(x, params["w"]))
        with jax.named_scope("loop"), jax.named_scope("inner"):
            h, _ = lax.scan(lambda c, _: (lax.cos(c), None), h, None, length=3)
        return lax.cond(True, lambda h: h, lambda h: lax.neg(h), h)

    graph = fg.trace(f, {"w": jnp.ones((3, 4))}, X)
    assert str(graph) == (
        "f(params['w']: f32[3,4], x: f32[2,3])\n"
        "  dense_0:\n"
        "    a:f32[2,4] = dot_general[dimension_numbers=(((1,), (0,)), ((), ()))] x params['w']\n"
        "    b:f32[2,4] = sin a\n"
        "  loop:\n"
        "    inner:\n"
        "      c:f32[2,4] = scan[length=3] b\n"
        "        jaxpr(d:f32[2,4])\n"
        "          e:f32[2,4] = cos d\n"
        "          return e\n"
        "  f:f32[2,4] = cond 1 c\n"
        "    branches[0](g:f32[2,4])\n"
        "      h:f32[2,4] = neg g\n"
        "      return h\n"
        "    branches[1](i:f32[2,4])\n"
        "      return i\n"
        "  return f"
    )
    assert graph.text(source=True).count("  # test_graph.py:") == 6
    assert repr(graph) == "Graph(f(params['w']: float32[3,4], x: float32[2,3]) -> float32[2,4], 4 equations)"


def test_long_graphs_are_folded():
    def f(x):
        for _ in range(500):
            x = lax.sin(x)
        return x

    graph = fg.trace(f, 1.0)
    assert len(str(graph).splitlines()) == 202
    assert "… 301 lines folded; text(lines=None) shows all …" in str(graph)
    assert len(graph.text(lines=None).splitlines()) == 502


def test_walk_goes_into_sub_graphs():
    f = jax.jit(lambda x: lax.scan(lambda c, _: (lax.sin(c), None), x, None, length=3)[0])
    assert [(path, eqn.primitive.name) for path, eqn in fg.walk(fg.trace(f, 1.0))] == [
        ((), "jit"),
        (("jit.jaxpr",), "scan"),
        (("jit.jaxpr", "scan.jaxpr"), "sin"),
    ]
