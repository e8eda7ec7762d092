"""Gradients within a memory budget: the values of JAX's own, programs that keep to the budget, what is compiled when, errors."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ...checks import assert_close_values, temp_bytes
from ...sampling import sampled

W, X = 0.9 * jnp.eye(16) + 0.02, jnp.linspace(-1, 1, 64 * 16).reshape(64, 16)
KEY = jax.random.key(7, impl="rbg")  # XLA takes seconds to compile threefry


def loss(w, x):
    for _ in range(6):
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def scanned(w, x):
    return jnp.sum(lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=12)[0] ** 2)


def smallest(f, *args, **options):
    """Bytes of the smallest program for a gradient; there is one of fewer bytes than 1 only if it needs none at all."""
    try:
        fg.value_and_grad(f, memory=1, **options)(*args)
    except fg.BudgetError as e:
        return e.smallest
    return 1


def default(f, *args, **options):
    return temp_bytes(jax.value_and_grad(f, **options), *args)


# ------------------------------------------------------------------------------------------------ values


@jax.custom_vjp
def sevenfold(x):
    return jnp.sin(x)


sevenfold.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, ct: (7 * cos * ct,))


@jax.custom_jvp
def threefold(x):
    return jnp.sin(x)


threefold.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 3 * tangents[0] * jnp.cos(primals[0])))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["act"])
@dataclass
class Layer:
    w: jax.Array
    b: jax.Array | None
    act: str


def layers(layer, x, *, scale):
    for _ in range(5):
        x = getattr(jnp, layer.act)(x @ layer.w["w"]) * scale
    return jnp.sum(x**2)


def dropped(key, w, x):
    for k in jax.random.split(key):
        x = jnp.tanh(x @ w) * jax.random.bernoulli(k, 0.8, x.shape).astype(x.dtype)
    return jnp.sum(x**2)


def chain(step, dtype=None):
    def f(w, x):
        w, x = (w, x) if dtype is None else (w.astype(dtype), x.astype(dtype))
        for _ in range(4):
            x = step(w, x)
        return jnp.sum(jnp.abs(x) ** 2).astype(jnp.float32)

    return f


def while_inside(w, x):
    more = lambda state: state[0] < 3
    return lax.while_loop(more, lambda state: (state[0] + 1, jnp.tanh(state[1] @ w)), (jnp.int32(0), x))[1]


ORDER, TABLE = np.arange(16)[::-1], jnp.linspace(0.5, 2, 16)
scaled = jax.jit(lambda x: x * TABLE[::-1])
PROGRAMS = {
    "products": (loss, (W, X), {}),
    "argnums": (loss, (W, X), dict(argnums=(1, 0))),
    "negative argnums": (loss, (W, X), dict(argnums=-1)),
    "has_aux": (lambda w, x: (loss(w, x), {"x": x @ w, "none": None}), (W, X), dict(has_aux=True)),
    "integers": (
        lambda n, w, x: loss(w, x) * n.astype(x.dtype),
        (jnp.int32(3), W, X),
        dict(argnums=(0, 1), allow_int=True),
    ),
    "scalars": (lambda a, n, w: loss(w * a, X) * n, (0.9, 2, W), {}),
    "static": (lambda w, how, flag: loss(w, X) if how == "plain" and flag is True else 0.0, (W, "plain", True), {}),
    "closed-over key": (lambda w, x: dropped(KEY, w, x), (W, X), {}),
    "key": (dropped, (jax.random.key(7), W, X), dict(argnums=1)),
    "custom_vjp": (chain(lambda w, x: sevenfold(x @ w)), (W, X), {}),
    "custom_jvp": (chain(lambda w, x: threefold(x @ w)), (W, X), {}),
    "checkpoint": (chain(jax.checkpoint(lambda w, x: jnp.tanh(jnp.sin(x @ w) @ w))), (W, X), {}),
    "cond": (chain(lambda w, x: lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x @ w))), (W, X), {}),
    "switch": (chain(lambda w, x: lax.switch(1, [jnp.sin, lambda x: jnp.tanh(x @ w)], x)), (W, X), {}),
    "jit": (chain(jax.jit(lambda w, x: jnp.tanh(x @ w))), (W, X), {}),
    "jit with constants": (chain(jax.jit(lambda w, x: jnp.tanh(x[:, ORDER] @ w) * TABLE)), (W, X), {}),
    "jit in jit with constants": (chain(jax.jit(lambda w, x: scaled(jnp.tanh(x @ w)) * TABLE)), (W, X), {}),
    "static types": (lambda w, x, dtype: loss(w, x.astype(dtype)), (W, X, jnp.float32), {}),
    "bfloat16": (chain(lambda w, x: jnp.tanh(x @ w), jnp.bfloat16), (W, X), {}),
    "float16": (chain(lambda w, x: jnp.tanh(x @ w), jnp.float16), (W, X), {}),
    "complex": (chain(lambda w, x: jnp.sin(x @ w), jnp.complex64), (W, X), {}),
    "fori_loop": (lambda w, x: jnp.sum(lax.fori_loop(0, 9, lambda i, x: jnp.tanh(x @ w) + 0.1 * i, x)), (W, X), {}),
    "constant": (lambda x: 3.0, (1.0,), {}),
    "unused": (lambda x, n: 2.0 * x, (1.0, jnp.int32(1)), dict(argnums=1, allow_int=True)),
    "empty": (lambda x: jnp.sum(jnp.tanh(x) @ x.T), (jnp.ones((0, 3)),), {}),
}
# Reordered sums in half precision: a few units in the last place, whichever way XLA fuses them.
HALF = {"bfloat16": 2e-2, "float16": 2e-3}


def without_float0(tree):
    return jax.tree.map(lambda x: x.shape if x.dtype == jax.dtypes.float0 else x, tree)


SAMPLE = (
    "products",
    "negative argnums",
    "has_aux",
    "integers",
    "static",
    "static types",
    "scalars",
    "closed-over key",
    "cond",
    "jit with constants",
    "custom_vjp",
    "constant",
    "unused",
    "empty",
)


@pytest.mark.parametrize("name", sampled(PROGRAMS, SAMPLE))
def test_values(name):
    f, args, options = PROGRAMS[name]
    least = smallest(f, *args, **options)
    static = {"static": (1, 2), "static types": 2}.get(name, ())
    want = jax.jit(jax.value_and_grad(f, **options), static_argnums=static)(*args)
    most = least if static else default(f, *args, **options)
    for memory in {least, (least + max(least, most)) // 2} if name not in SAMPLE else {least}:
        got = fg.value_and_grad(f, memory=memory, **options)(*args)
        if name not in HALF:
            assert_close_values(*map(without_float0, (got, want)))
        else:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=HALF[name] * jnp.abs(b).max()), got, want
            )


def test_trees_and_keywords():
    layer = Layer({"w": W}, None, "tanh")
    got = fg.grad(layers, memory="200%")(layer, X, scale=jnp.float32(0.9))
    assert_close_values(got, jax.grad(layers)(layer, X, scale=jnp.float32(0.9)))
    assert (got.b, got.act) == (None, "tanh")


def test_double_precision():
    with jax.enable_x64(True):
        w, x = (jnp.asarray(np.asarray(v), jnp.float64) for v in (W, X))
        got = fg.value_and_grad(scanned, memory="60%")(w, x)
        want = jax.jit(jax.value_and_grad(scanned))(w, x)
        assert got[1].dtype == jnp.float64
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)


def test_one_wrapper_for_single_and_double_precision():
    g = fg.grad(scanned, memory="80%")
    assert g(W, X).dtype == jnp.float32
    with jax.enable_x64(True):
        assert g(np.asarray(W, np.float64), np.asarray(X, np.float64)).dtype == jnp.float64


def test_holomorphic():
    f = lambda z: jnp.sum(lax.scan(lambda z, _: (jnp.sin(z) * 0.9, None), z, None, length=8)[0])
    z = lax.complex(X, X * 0.5)
    got = fg.value_and_grad(f, holomorphic=True, memory=smallest(f, z, holomorphic=True))(z)[1]
    assert_close_values(got, jax.jit(jax.grad(f, holomorphic=True))(z))


def test_dynamic_loops():
    """JAX has no reverse mode for these; its own forward mode says what is right."""
    f = lambda w: jnp.sum(while_inside(w, X[:2]) ** 2)
    got = fg.value_and_grad(f, memory=smallest(f, W))(W)[1]
    np.testing.assert_allclose(got, jax.jit(jax.jacfwd(f))(W), rtol=1e-4, atol=1e-5)


def test_a_gradient_without_equations():
    assert fg.grad(lambda x, n: 2.0 * x, 1, allow_int=True, memory=1)(1.0, jnp.int32(1)).dtype == jax.dtypes.float0


def test_gradients_that_are_no_arrays_are_no_tracers():
    _, float0 = fg.grad(lambda x, n: x * n.astype(x.dtype), (0, 1), allow_int=True, memory="50%")(1.0, jnp.int32(2))
    assert not isinstance(float0, jax.core.Tracer)
    assert float0.dtype == jax.dtypes.float0


# ------------------------------------------------------------------------------------------------ transforms around it


@pytest.fixture(scope="module")
def budget():
    return smallest(scanned, W, X)


@pytest.mark.parametrize("around", [jax.jit, pytest.param(fg.jit, marks=pytest.mark.slow)], ids=["jax", "funcgrad"])
def test_under_jit(around, budget):
    assert_close_values(around(fg.grad(scanned, memory=budget))(W, X), jax.jit(jax.grad(scanned))(W, X))


@pytest.mark.parametrize("axes", sampled([(None, 0), (0, None), (0, 0)], ["(None, 0)"]))
def test_under_vmap(axes, budget):
    args = [v if axis is None else jnp.stack([v, 0.5 * v, 0.1 * v]) for v, axis in zip((W, X), axes, strict=True)]
    got = jax.vmap(fg.grad(scanned, memory=budget), axes)(*args)
    assert_close_values(got, jax.jit(jax.vmap(jax.grad(scanned), axes))(*args))


def test_vmap_inside():
    f = lambda w, x: jnp.sum(jax.vmap(scanned, (None, 0))(w, x))
    x = jnp.stack([X, 0.5 * X])
    assert_close_values(fg.grad(f, memory=smallest(f, W, x))(W, x), jax.jit(jax.grad(f))(W, x))


@pytest.mark.parametrize(
    "second",
    [
        lambda g: jax.jacfwd(lambda w: g(w, X[:4]))(W),
        pytest.param(lambda g: jax.jacrev(lambda w: g(w, X[:4]))(W), marks=pytest.mark.slow),
        pytest.param(lambda g: jax.grad(lambda w: jnp.sum(g(w, X[:4]) ** 2))(W), marks=pytest.mark.slow),
    ],
    ids=["jacfwd", "jacrev", "grad"],
)
def test_second_derivatives(second):
    g = fg.grad(scanned, memory=smallest(scanned, W, X[:4]))
    got, want = jax.jit(lambda: second(g))(), jax.jit(lambda: second(jax.grad(scanned)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_budget_inside_of_a_budget():
    inner = fg.grad(scanned, memory="60%")
    f, g = (lambda w, x, d=d: jnp.sum(d(w, x) ** 2) for d in (inner, jax.grad(scanned)))
    plan = fg.plan(f, W, X, memory="80%")
    assert plan.compiled_bytes <= 0.8 * plan.default_bytes
    got, want = plan.graph(W, X), jax.jit(jax.value_and_grad(g))(W, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_hessian_of_the_value(budget):
    w, x = W[:4, :4], X[:, :4]
    got = jax.jit(jax.hessian(lambda w: fg.value_and_grad(scanned, memory="90%")(w, x)[0]))(w)
    np.testing.assert_allclose(got, jax.jit(jax.hessian(scanned))(w, x), rtol=1e-4, atol=1e-4)


def test_of_graphs(budget):
    graph = fg.grad(fg.trace(scanned, W, X), memory=budget)
    assert isinstance(graph, fg.Graph)
    assert_close_values(fg.verify(graph)(W, X), jax.jit(jax.grad(scanned))(W, X))
    assert fg.plan(fg.trace(scanned, W, X), W, X, memory=budget).compiled_bytes <= budget


@pytest.mark.parametrize("is_scope", [False, True])
def test_rules(is_scope):
    def f(w, x):
        for k in range(4):
            with jax.named_scope(f"block_{k}"):
                x = lax.round(jnp.tanh(x @ w) * 8) / 8
        return jnp.sum(x**2)

    through = lambda eqn, x: x + lax.stop_gradient(lax.round(x) - x)
    twice = lambda region, *values: jax.tree.map(lambda y: 2 * y, region(*values))
    rules = {"block_*": twice} if is_scope else {lax.round_p: through}
    got = fg.grad(f, rules=rules, memory=smallest(f, W, X, rules=rules))(W, X)
    want = jax.jit(fg.grad(f, rules=rules))(W, X)
    assert_close_values(got, want)
    assert is_scope or float(jnp.abs(want).max()) > 0  # without the rule, the gradient is zero


def test_closed_over_tracers(budget):
    """A wrapper that closes over tracers belongs to one trace; what it planned there is not taken in the next."""
    context = {}
    g = fg.grad(lambda w: scanned(w, context["x"]), memory="90%")

    def outer(w, x, factor):
        context["x"] = factor * x
        return g(w)

    for factor in (1.0, 2.0):
        got = jax.jit(outer, static_argnums=2)(W, X, factor)
        assert_close_values(got, jax.jit(jax.grad(scanned))(W, factor * X))
    batched = jax.jit(jax.vmap(lambda x: fg.grad(lambda w: scanned(w, x), memory=budget)(W)))(jnp.stack([X, 2 * X]))
    assert_close_values(batched[1], jax.jit(jax.grad(scanned))(W, 2 * X))
    push = lambda g: jax.jit(lambda x: jax.jvp(g, (x,), (x,))[1])(X)
    tangent = push(lambda x: fg.grad(lambda w: scanned(w, x), memory=budget)(W))
    want = push(lambda x: jax.grad(scanned)(W, x))
    np.testing.assert_allclose(tangent, want, rtol=1e-4, atol=1e-4)


def test_donated(budget):
    step = jax.jit(lambda w, x: w - 0.1 * fg.grad(scanned, memory=budget)(w, x), donate_argnums=0)
    donated = W + 0
    assert_close_values(step(donated, X), jax.jit(lambda w, x: w - 0.1 * jax.grad(scanned)(w, x))(W, X))
    assert donated.is_deleted()


# ------------------------------------------------------------------------------------------------ many devices


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])


def test_sharded(mesh):
    x, w = jax.device_put(X, NamedSharding(mesh, P("i"))), jax.device_put(W, NamedSharding(mesh, P()))
    got = fg.grad(scanned, 1, memory=smallest(scanned, w, x, argnums=1))(w, x)
    want = jax.jit(jax.grad(scanned, 1))(w, x)
    assert got.sharding.is_equivalent_to(want.sharding, 2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # Bytes are those of one device.
    assert fg.plan(scanned, w, x, memory="100%").compiled_bytes < fg.plan(scanned, W, X, memory="100%").compiled_bytes


def test_explicit_shardings():
    mesh = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Explicit,), devices=jax.devices("cpu")[:4])
    x, w = jax.device_put(X, NamedSharding(mesh, P("i"))), jax.device_put(W, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        got = fg.grad(loss, 1, memory=smallest(loss, w, x, argnums=1))(w, x)
        want = jax.jit(jax.grad(loss, 1))(w, x)
    assert got.sharding == want.sharding
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_other_device():
    w, x = jax.device_put((W, X), jax.devices("cpu")[3])
    assert fg.grad(loss, memory="100%")(w, x).devices() == {jax.devices("cpu")[3]}


def test_shard_map_inside(mesh):
    def f(w, x):
        inner = lambda w, x: lax.psum(scanned(w, x), "i")
        return jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("i")), out_specs=P())(w, x)

    got = fg.value_and_grad(f, memory=smallest(f, W, X))(W, X)
    assert_close_values(got, jax.jit(jax.value_and_grad(f))(W, X))


def test_named_axes_outside_are_refused(mesh):
    message = "cannot be compiled inside a function that is mapped over 'i'"
    f = lambda w, x: lax.psum(fg.grad(loss, memory="90%")(w, x), "i")
    with pytest.raises(fg.OptionError, match=message):
        jax.shard_map(f, mesh=mesh, in_specs=(P(), P("i")), out_specs=P())(W, X)
    with pytest.raises(fg.OptionError, match=message):
        jax.vmap(fg.grad(lambda w, x: lax.psum(loss(w, x), "i"), memory="90%"), (None, 0), axis_name="i")(W, X[None])


# ------------------------------------------------------------------------------------------------ effects


def chained(effect):
    def f(w, x):
        x = jnp.tanh(x @ w)
        x = effect(x)
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    return f


seen: list[float] = []


def noticed(x):
    seen.append(float(x))
    return np.float32(1)


ONE = jax.ShapeDtypeStruct((), jnp.float32)
first = lambda x: lax.stop_gradient(x[0, 0])
EFFECTS = {
    "debug.callback": lambda x: (jax.debug.callback(noticed, x[0, 0]), x)[1],
    "debug.callback, ordered": lambda x: (jax.debug.callback(noticed, x[0, 0], ordered=True), x)[1],
    "io_callback": lambda x: x * io_callback(noticed, ONE, first(x)),
    "io_callback, ordered": lambda x: x * io_callback(noticed, ONE, first(x), ordered=True),
}


@pytest.mark.parametrize("name", sampled(EFFECTS, ["debug.callback", "io_callback, ordered"]))
def test_effects_happen_once(name):
    f = chained(EFFECTS[name])
    memory = smallest(f, W, X)
    seen.clear()
    got = fg.grad(f, memory=memory)(W, X)
    jax.effects_barrier()
    assert len(seen) == 1
    np.testing.assert_allclose(got, jax.jit(jax.grad(chained(lambda x: x)))(W, X), rtol=1e-5, atol=1e-6)


def test_ordered_effects_keep_their_order():
    notice = lambda what, x: jax.debug.callback(lambda _: seen.append(what), x, ordered=True)

    @jax.custom_vjp
    def noted(x):
        return jnp.tanh(x)

    def forward(x):
        notice("forward", x)
        return jnp.tanh(x), x

    def backward(x, ct):
        notice("cotangent", ct)
        notice("residual", x)
        return (ct * (1 - jnp.tanh(x) ** 2),)

    noted.defvjp(forward, backward)
    f = chained(lambda x: noted(noted(x)))
    memory = smallest(f, W, X)
    seen.clear()
    got = jax.block_until_ready(fg.grad(f, memory=memory)(W, X))
    jax.effects_barrier()
    assert seen == ["forward"] * 2 + ["cotangent", "residual"] * 2
    seen.clear()
    np.testing.assert_allclose(got, jax.jit(jax.grad(f))(W, X), rtol=1e-5, atol=1e-6)
    jax.effects_barrier()
    assert seen == ["forward"] * 2 + ["cotangent", "residual"] * 2


def test_effects_in_scans_happen_once_per_step():
    def f(w, x):
        step = lambda x, k: (jnp.tanh(x @ w), jax.debug.callback(lambda k: seen.append(int(k)), k))
        return jnp.sum(lax.scan(step, x, jnp.arange(6))[0] ** 2)

    memory = smallest(f, W, X)
    seen.clear()
    fg.grad(f, memory=memory)(W, X)
    jax.effects_barrier()
    assert sorted(seen) == list(range(6))
