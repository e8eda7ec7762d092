"""Reverse mode through `while` loops: values, every composition, schedules, memory, and algorithms that people run."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ...checks import assert_near
from ...sampling import sampled

W = jax.random.normal(jax.random.key(0), (4, 4)) / 2
X = jnp.arange(1.0, 5.0) / 4
N = 11
SMALL = fg.Loops(checkpoints=3, residual_steps=2)  # so that few steps are enough for every part of the schedule

total = lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))
body = lambda w, x: jnp.sin(w @ x) + x / 10


def loop(w, x, n):
    """`n` steps, in a loop that knows nothing of their number."""
    return lax.while_loop(lambda t: t[0] < n, lambda t: (t[0] + 1, body(w, t[1])), (0, x))[1]


def counted(w, x, n):
    """As `loop`, in a form that JAX reverses."""
    return lax.scan(lambda x, _: (body(w, x), None), x, None, length=int(n))[0]


def gradient(f, *args, loops=SMALL, argnums=(0, 1)):
    return jax.jit(fg.grad(lambda *a: total(f(*a)), argnums, loops=loops))(*args)


def assert_same_gradient(f, by_hand, *args, argnums=(0, 1), rtol=1e-4):
    want = jax.jit(jax.grad(lambda *a: total(by_hand(*a)), argnums))(*args)
    assert_near(gradient(f, *args, argnums=argnums), want, rtol)
    graph = fg.grad(fg.trace(lambda *a: total(f(*a)), *args), argnums, loops=SMALL)
    assert_near(jax.jit(graph)(*args), want, rtol)


# ------------------------------------------------------------------------------------------------ values and schedules


GRID = list(itertools.product([1, 2, 3, 4, 8, 32], [1, 4, 16]))


@pytest.mark.parametrize("grid", sampled(GRID, ["(1, 1)", "(2, 4)", "(3, 1)", "(32, 16)"]))
def test_gradients_of_any_number_of_steps(grid):
    got = jax.jit(fg.value_and_grad(lambda w, x, n: total(loop(w, x, n)), (0, 1), loops=fg.Loops(*grid)))
    for n in [*range(20), 31, 32, 33, 64, 65, 100, 101, 500]:
        assert_near(got(W, X, n), reference(W, X, n), 2e-4)


@jax.jit
def reference(w, x, n):
    """JAX's own gradient, of a scan of 500 steps that keeps the state after the first `n`."""
    step = lambda w, x, k: jnp.where(k < n, body(w, x), x)
    f = lambda w, x: lax.scan(lambda x, k: (step(w, x, k), None), x, jnp.arange(500))[0]
    return jax.value_and_grad(lambda w, x: total(f(w, x)), (0, 1))(w, x)


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        w, x = jnp.asarray(W, float), jnp.asarray(X, float)
        f = lambda w: total(loop(w, x, 23))
        along = jax.random.normal(jax.random.key(1), w.shape, float)
        slope = (f(w + 1e-5 * along) - f(w - 1e-5 * along)) / 2e-5
        np.testing.assert_allclose(jnp.sum(fg.grad(f, loops=SMALL)(w) * along), slope, rtol=1e-6)


@pytest.mark.parametrize("steps", [100, 10_000])
def test_memory_does_not_grow_with_the_number_of_steps(steps):
    x = jnp.ones(10_000)
    f = fg.grad(lambda x, n: total(lax.while_loop(lambda t: t[0] < n, lambda t: (t[0] + 1, jnp.sin(t[1])), (0, x))[1]))
    compiled = jax.jit(f).lower(x, steps).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (32 + 16 + 12) * x.nbytes
    jax.block_until_ready(compiled(x, steps))


# ------------------------------------------------------------------------------------------------ where loops stand


def in_scan(step, w, x):
    return lax.scan(lambda x, k: (step(w, x, k), x), x, jnp.arange(4))


def in_shard_map(step, w, x):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    f = lambda w, x, n: step(w, x[0], n[0])[None]
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("i"), P("i")), out_specs=P("i"))
    return mapped(w, jnp.stack([x, x + 1, x - 1, 2 * x]), jnp.array([3, 0, 5, 9]))


def with_own_jvp(step, w, x):
    f = jax.custom_jvp(lambda w, x: step(w, x, N))
    f.defjvp(lambda primals, tangents: jax.jvp(lambda w, x: 2 * step(w, x, N), primals, tangents))
    return f(w, x)


def with_own_vjp(step, w, x):
    f = jax.custom_vjp(lambda w, x: step(w, x, N))
    pulled = lambda kept, ct: fg.vjp(lambda w, x: 2 * step(w, x, N), *kept)[1](ct)
    f.defvjp(lambda w, x: (step(w, x, N), (w, x)), pulled)
    return f(w, x)


def nested(step, w, x):
    for k in range(4):
        x = step(w, x, k) * 0.9
    return x


def in_a_loop(step, w, x):
    return lax.while_loop(lambda t: t[0] < 4, lambda t: (t[0] + 1, step(w, t[1], t[0]) * 0.9), (0, x))[1]


PLACES = {
    "jit": lambda step, w, x: jax.jit(step, static_argnums=2)(w, x, N),
    "scan": in_scan,
    "cond": lambda step, w, x: lax.cond(x[0] < 1, lambda: step(w, x, N), lambda: x),
    "switch under vmap": lambda step, w, x: jax.vmap(
        lambda k, x: lax.switch(k, [lambda x: x, lambda x: step(w, x, 3), lambda x: step(w, x, N)], x)
    )(jnp.arange(3), jnp.stack([x, x, x])),
    "remat": lambda step, w, x: jax.checkpoint(lambda w, x: step(w, x, N))(w, x) ** 2,
    "custom_jvp": with_own_jvp,
    "custom_vjp": with_own_vjp,
    "twice": lambda step, w, x: step(w, step(w, x, 3), N),
    "vmap": lambda step, w, x: jax.vmap(lambda x: step(w, x, N))(jnp.stack([x, x + 1])),
    "vmap of weights": lambda step, w, x: jax.vmap(lambda w: step(w, x, N))(jnp.stack([w, w / 2])),
}  # fmt: skip


@pytest.mark.parametrize(
    "place", sampled(PLACES, ["jit", "scan", "cond", "remat", "custom_jvp", "custom_vjp", "vmap of weights"])
)
def test_loops_are_reversed_wherever_they_stand(place):
    by_hand = {"scan": lambda w, x: (lambda a, b, c: (c, (x, x, a, b)))(
        counted(w, x, 1), counted(w, counted(w, x, 1), 2), counted(w, counted(w, counted(w, x, 1), 2), 3)
    )}.get(place, lambda w, x: PLACES[place](counted, w, x))  # fmt: skip
    assert_same_gradient(lambda w, x: PLACES[place](loop, w, x), by_hand, W, X)


def test_a_loop_in_a_loop():
    assert_same_gradient(lambda w, x: in_a_loop(loop, w, x), lambda w, x: nested(counted, w, x), W, X)


def test_shards_of_a_mesh_may_differ_in_their_steps():
    """The cotangents of the weights that they share are summed once."""
    by_hand = lambda w, x: [counted(w, row, n) for row, n in zip([x, x + 1, x - 1, 2 * x], (3, 0, 5, 9), strict=True)]
    want = jax.jit(jax.grad(lambda *a: total(by_hand(*a)), (0, 1)))(W, X)
    assert_near(gradient(functools.partial(in_shard_map, loop), W, X), want, 1e-4)


def test_plain_jax_differentiates_a_differentiable_function():
    f = fg.differentiable(lambda w, x: total(loop(w, x, N)), loops=SMALL)
    want = jax.jit(jax.grad(lambda w, x: total(counted(w, x, N)), (0, 1)))(W, X)
    pulled = lambda w, x: jax.vjp(f, w, x)[1](1.0)
    for got in jax.jit(lambda w, x: (jax.grad(f, (0, 1))(w, x), jax.jacrev(f, (0, 1))(w, x), pulled(w, x)))(W, X):
        assert_near(got, want, 1e-4)


def test_where_no_gradient_flows_the_program_is_the_same():
    f = lambda x: jnp.sin(x) * lax.while_loop(lambda t: t < 10.0, lambda t: t * 2, lax.stop_gradient(x))
    programs = [jax.jit(m.grad(f)).lower(1.0).compile().as_text() for m in (jax, fg)]
    assert programs[0].count(" while(") == programs[1].count(" while(") == 1


def test_as_jax_where_the_length_is_known():
    f = lambda x: lax.fori_loop(0, 10, lambda k, x: jnp.sin(x), x)
    assert jax.make_jaxpr(fg.grad(f))(1.0).pretty_print() == jax.make_jaxpr(jax.grad(f))(1.0).pretty_print()


# ------------------------------------------------------------------------------------------------ what a loop carries


def random_steps(unrolled, x, key):
    def step(t):
        k, x, key, flag = t
        key, sub = jax.random.split(key)
        return k + 1, jnp.where(flag, x * jax.random.uniform(sub, x.shape), x + 1), key, ~flag

    state = (jnp.int32(0), x, key, jnp.bool_(True))
    if not unrolled:
        return lax.while_loop(lambda t: t[0] < 7, step, state)[1]
    for _ in range(7):
        state = step(state)
    return state[1]


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["key", "raw key"])
def test_keys_flags_and_counters_are_carried(key):
    f, by_hand = (functools.partial(random_steps, unrolled) for unrolled in (False, True))
    assert_same_gradient(f, by_hand, X, key, argnums=0)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.complex64])
def test_dtypes(dtype):
    w, x = W.astype(dtype), X.astype(dtype)
    real = lambda step: lambda w, x: jnp.sum(jnp.real(step(w, x, N) * jnp.conj(step(w, x, N)))).astype(jnp.float32)
    got = jax.jit(fg.grad(real(loop), (0, 1), loops=SMALL))(w, x)
    want = jax.jit(jax.grad(real(counted), (0, 1)))(w, x)
    assert [x.dtype for x in got] == [dtype, dtype]
    assert_near(
        *(jax.tree.map(lambda x: x.astype(jnp.promote_types(dtype, jnp.float32)), t) for t in (got, want)), 3e-2
    )


def test_double_precision():
    with jax.enable_x64(True):
        w, x = jnp.asarray(W, float), jnp.asarray(X, float)
        want = jax.grad(lambda w, x: total(counted(w, x, N)), (0, 1))(w, x)
        assert_near(fg.grad(lambda w, x: total(loop(w, x, N)), (0, 1), loops=SMALL)(w, x), want, 1e-12)


def test_python_scalars():
    f = lambda x: lax.while_loop(lambda x: x < 100.0, lambda x: x * x + 1.0, x)
    by_hand = lambda x: (((x * x + 1) ** 2 + 1) ** 2 + 1) ** 2 + 1
    got, want = fg.grad(f)(1.1), jax.grad(by_hand)(1.1)
    assert_near(got, want, 1e-5)
    assert got.weak_type == want.weak_type


def test_bounds_that_are_traced():
    f = lambda w, x, n: lax.fori_loop(2, n, lambda k, x: body(w, x) * k / 4, x)
    by_hand = lambda w, x, n: functools.reduce(lambda x, k: body(w, x) * k / 4, range(2, 9), x)
    got = gradient(f, W, X, 9)
    assert_near(got, jax.grad(lambda w, x: total(by_hand(w, x, 9)), (0, 1))(W, X), 1e-4)


def test_arguments_may_be_donated():
    f = jax.jit(fg.value_and_grad(lambda w, x: total(loop(w, x, N)), (0, 1), loops=SMALL), donate_argnums=(0, 1))
    want = jax.value_and_grad(lambda w, x: total(counted(w, x, N)), (0, 1))(W, X)
    assert_near(f(jnp.copy(W), jnp.copy(X)), want, 1e-4)


def test_collectives_in_the_body():
    step = lambda w, x: jnp.sin(w @ x) + lax.psum(x, "lanes") / 10

    def run(is_loop, w, x):
        def one(x):
            if is_loop:
                return lax.while_loop(lambda t: t[0] < 5, lambda t: (t[0] + 1, step(w, t[1])), (0, x))[1]
            return functools.reduce(lambda x, _: step(w, x), range(5), x)

        return jax.vmap(one, axis_name="lanes")(jnp.stack([x, 2 * x]))

    assert_same_gradient(*(functools.partial(run, is_loop) for is_loop in (True, False)), W, X)


def test_what_the_loop_reads_from_around_it():
    """Weights, a table and a traced value that it closes over: their cotangents are summed over the steps."""

    def run(step, w, x):
        scale, table = jnp.tanh(x), np.arange(4, dtype=np.float32)
        return step(lambda x: jnp.sin(w @ x) * scale + table / 9, x)

    def by_while(f, x):
        return lax.while_loop(lambda t: t[0] < N, lambda t: (t[0] + 1, f(t[1])), (0, x))[1]

    by_hand = lambda f, x: functools.reduce(lambda x, _: f(x), range(N), x)
    assert_same_gradient(functools.partial(run, by_while), functools.partial(run, by_hand), W, X)


def test_effects_stay_in_order_or_are_refused():
    def f(x):
        def step(x):
            jax.debug.callback(lambda x: None, x, ordered=True)
            return x * 2

        return lax.while_loop(lambda x: x < 10, step, x)

    assert fg.jvp(f, (1.0,), (1.0,))[1] == 16
    with pytest.raises(fg.GraphError, match=r"a while loop that cannot run again[\s\S]*ordered effects"):
        fg.grad(f)(1.0)
    with pytest.raises(ValueError, match="while_loop"):
        fg.vjp(f, 1.0)[1](1.0)


def test_wrappers_of_fresh_functions_leave_memory_stable():
    import gc
    import weakref

    def once():
        x = jnp.ones(3)
        f = lambda x: total(lax.while_loop(lambda t: jnp.sum(t) < 9, lambda t: t * 2, x))
        fg.grad(f)(x)
        return weakref.ref(f)

    refs = [once() for _ in range(3)]
    jax.clear_caches()
    gc.collect()
    assert not any(ref() for ref in refs)


# ------------------------------------------------------------------------------------------------ algorithms


def newton(a):
    """The root of x² = a; its derivative is 1 / (2 √a)."""
    return lax.while_loop(lambda x: jnp.abs(x * x - a) > 1e-6 * a, lambda x: x - (x * x - a) / (2 * x), a + 1)


def test_newton():
    np.testing.assert_allclose(jax.jit(fg.grad(newton))(7.0), 0.5 / 7**0.5, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(fg.grad(fg.grad(newton)))(7.0), -0.25 / 7**1.5, rtol=1e-3)
    a = jnp.array([0.1, 1.0, 2.0, 50.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(fg.grad(newton)))(a), 0.5 / a**0.5, rtol=1e-4)


def pagerank(weights):
    links = weights / weights.sum(0)
    step = lambda x: 0.85 * links @ x + 0.15 / len(weights)
    start = jnp.full(len(weights), 1 / len(weights))
    done = lambda t: jnp.abs(t[0] - t[1]).sum() > 1e-7
    return lax.while_loop(done, lambda t: (step(t[0]), t[0]), (step(start), start))[0]


def test_pagerank():
    """The derivative of the fixed point: (I - 0.85 A)⁻¹."""
    weights = jax.random.uniform(jax.random.key(4), (6, 6))
    n = len(weights)
    solved = lambda w: jnp.linalg.solve(jnp.eye(n) - 0.85 * w / w.sum(0), jnp.full(n, 0.15 / n))[2]
    got, want = fg.grad(lambda w: pagerank(w)[2]), jax.grad(solved)
    assert_near(jax.jit(got)(weights), jax.jit(want)(weights), 1e-3)


def sinkhorn(cost):
    kernel = jnp.exp(-cost)

    def step(t):
        u, _, k = t
        v = 1 / (kernel.T @ u)
        return 1 / (kernel @ v), v, k + 1

    u, v, _ = lax.while_loop(lambda t: (jnp.abs(t[1] * (kernel.T @ t[0]) - 1).max() > 1e-6) & (t[2] < 500), step,
                             (jnp.ones(len(cost)), jnp.zeros(len(cost)), 0))  # fmt: skip
    return u[:, None] * kernel * v


def test_sinkhorn():
    """The derivative of the optimal value with respect to the cost is the plan (envelope theorem)."""
    cost = jax.random.uniform(jax.random.key(5), (5, 5))

    def value(cost):
        plan = sinkhorn(cost)
        return jnp.sum(plan * cost) + jnp.sum(plan * jnp.log(plan)) - jnp.sum(plan)

    assert_near(jax.jit(fg.grad(value))(cost), jax.jit(sinkhorn)(cost), 1e-3)


def decay(rate, time=1.0):
    """x' = -rate x by Heun's method with a step size that the error chooses."""

    def step(t):
        now, x, h = t
        slope = -rate * x
        wide = -rate * (x + h * slope)
        error = h * jnp.abs(wide - slope) / 2
        is_good = error < 1e-5
        new = jnp.clip(0.9 * h * jnp.sqrt(1e-5 / jnp.maximum(error, 1e-12)), h / 5, 5 * h)
        now, x = jnp.where(is_good, now + h, now), jnp.where(is_good, x + h * (slope + wide) / 2, x)
        return now, x, jnp.minimum(lax.stop_gradient(new), time - now)

    return lax.while_loop(lambda t: t[0] < time - 1e-6, step, (jnp.float32(0), jnp.float32(1), jnp.float32(0.1)))[1]


def test_a_step_size_that_adapts():
    np.testing.assert_allclose(jax.jit(fg.grad(decay))(2.0), -jnp.exp(-2.0), rtol=1e-2)


def test_gram_schmidt():
    """Each row is made orthogonal to those before; the loop over these has a length that is traced."""

    def orthogonal(matrix):
        def row(q, k):
            v = lax.fori_loop(0, k, lambda j, v: v - jnp.dot(q[j], v) * q[j], matrix[k])
            return q.at[k].set(v / jnp.linalg.norm(v)), None

        return lax.scan(row, jnp.zeros_like(matrix), jnp.arange(len(matrix)))[0]

    def by_qr(matrix):
        q, r = jnp.linalg.qr(matrix.T)
        return (q * jnp.sign(jnp.diagonal(r))).T

    weights = jax.random.normal(jax.random.key(6), W.shape)
    assert_near(jax.jit(orthogonal)(W), jax.jit(by_qr)(W), 1e-3)
    want = jax.grad(lambda m: jnp.sum(weights * by_qr(m)))
    got = fg.grad(lambda m: jnp.sum(weights * orthogonal(m)), loops=SMALL)
    assert_near(jax.jit(got)(W), jax.jit(want)(W), 2e-3)


def test_rejection_sampling():
    """A draw from a normal of width s that is cut at 1, by rejection: its derivative is that of the draw that was kept."""

    def sample(s, key):
        def step(t):
            key, sub = jax.random.split(t[0])
            return key, s * jax.random.normal(sub)

        return lax.while_loop(lambda t: jnp.abs(t[1]) > 1, step, (key, jnp.inf))[1]

    derive = jax.jit(fg.value_and_grad(sample))
    for seed in range(5):
        x, slope = derive(3.0, jax.random.key(seed))
        np.testing.assert_allclose(slope, x / 3.0, rtol=1e-5)


def test_greedy_decoding():
    """The log probability of what a small recurrent model says until it says stop."""
    key = jax.random.split(jax.random.key(7), 3)
    params = {"in": jax.random.normal(key[0], (5, 8)), "state": jax.random.normal(key[1], (8, 8)) / 3,
              "out": jax.random.normal(key[2], (8, 5))}  # fmt: skip

    def said(params, unrolled):
        def step(t):
            state, token, score, k = t
            state = jnp.tanh(params["in"][token] + params["state"] @ state)
            log_p = jax.nn.log_softmax(state @ params["out"])
            token = jnp.argmax(log_p)
            return state, token, score + log_p[token], k + 1

        state = jnp.zeros(8), jnp.argmax(jnp.zeros(5)) + 1, jnp.float32(0), 0
        is_unfinished = lambda t: (t[1] != 0) & (t[3] < 20)
        if not unrolled:
            return lax.while_loop(is_unfinished, step, state)[2]
        while is_unfinished(state):
            state = step(state)
        return state[2]

    got = jax.jit(fg.grad(lambda params: said(params, False)))(params)
    assert_near(got, jax.grad(said)(params, True), 1e-3)
