"""Reverse mode through `while` loops: values, every composition, schedules, memory, and algorithms that people run."""

from __future__ import annotations

import collections
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.while_loops.schedule import evaluations, lengths
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ..checks import assert_near

W = jax.random.normal(jax.random.key(0), (4, 4)) / 2
X = jnp.arange(1.0, 5.0) / 4
N = 11
SMALL = fg.Loops(checkpoints=3, residual_steps=2)  # so that few steps are enough for every part of the schedule

total = lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))
body = lambda w, x: jnp.sin(w @ x) + x / 10


def loop(w, x, n):
    """`n` steps, in a loop that knows nothing of their number."""
    return lax.while_loop(lambda t: t[0] < n, lambda t: (t[0] + 1, body(w, t[1])), (0, x))[1]


def known(w, x, n):
    """As `loop`, in a form that JAX reverses."""
    return lax.scan(lambda x, _: (body(w, x), None), x, None, length=int(n))[0]


def gradient(f, *args, loops=SMALL, argnums=(0, 1)):
    return jax.jit(fg.grad(lambda *a: total(f(*a)), argnums, loops=loops))(*args)


def assert_same_gradient(f, by_hand, *args, argnums=(0, 1), rtol=1e-4):
    want = jax.jit(jax.grad(lambda *a: total(by_hand(*a)), argnums))(*args)
    assert_near(gradient(f, *args, argnums=argnums), want, rtol)
    graph = fg.grad(fg.trace(lambda *a: total(f(*a)), *args), argnums, loops=SMALL)
    assert_near(graph(*args), want, rtol)


# ------------------------------------------------------------------------------------------------ values and schedules


@pytest.mark.parametrize("residual_steps", [1, 4, 16])
@pytest.mark.parametrize("checkpoints", [1, 2, 3, 4, 8, 32])
def test_gradients_of_any_number_of_steps(checkpoints, residual_steps):
    loops = fg.Loops(checkpoints, residual_steps)
    got = jax.jit(fg.value_and_grad(lambda w, x, n: total(loop(w, x, n)), (0, 1), loops=loops))
    for n in [*range(20), 31, 32, 33, 64, 65, 100, 101, 500]:
        assert_near(got(W, X, n), known_gradient(n), 2e-4)


@functools.cache
def known_gradient(n):
    return jax.jit(jax.value_and_grad(lambda w, x: total(known(w, x, n)), (0, 1)))(W, X)


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        w, x = jnp.asarray(W, float), jnp.asarray(X, float)
        f = lambda w: total(loop(w, x, 23))
        along = jax.random.normal(jax.random.key(1), w.shape, float)
        slope = (f(w + 1e-5 * along) - f(w - 1e-5 * along)) / 2e-5
        np.testing.assert_allclose(jnp.sum(fg.grad(f, loops=SMALL)(w) * along), slope, rtol=1e-6)


@pytest.mark.parametrize("residual_steps", [1, 3, 16])
@pytest.mark.parametrize("checkpoints", [1, 2, 5, 32])
def test_the_body_is_computed_as_often_as_the_schedule_says(checkpoints, residual_steps):
    calls = collections.Counter()

    @jax.custom_jvp
    def counted(x):
        return jax.pure_callback(lambda x: calls.update(["body"]) or np.sin(x), x, x)

    counted.defjvp(lambda primals, given: ((out := counted(*primals)), given[0] * out))
    loops = fg.Loops(checkpoints, residual_steps)

    def f(x, n):
        return lax.while_loop(lambda t: t[0] < n, lambda t: (t[0] + 1, counted(t[1]) + t[1] / 2), (0, x))[1]

    derive = jax.jit(fg.grad(f, loops=loops))
    for n in (0, 1, 2, 3, 7, 16, 17, 50, 101, 230):
        calls.clear()
        jax.block_until_ready(derive(jnp.float32(0.5), n))
        assert calls["body"] == evaluations(n, loops)


def test_no_more_than_one_evaluation_beside_the_optimum():
    """Of a schedule that knows the length before: Griewank & Walther 2000, equation (4)."""

    def optimum(steps, slots):  # with as many checkpoints, the first state among them
        repetitions = 0
        while np.prod([(slots + repetitions - k) / (k + 1) for k in range(repetitions)]) < steps:
            repetitions += 1
        beta = lambda s, r: round(float(np.prod([(s + r - k) / (k + 1) for k in range(r)])))
        return repetitions * steps - beta(slots + 1, repetitions - 1) + steps

    for slots in (4, 8, 16, 32, 100):
        for steps in (50, 200, 1000, 5000):
            assert evaluations(steps, fg.Loops(slots, 1)) <= optimum(steps, slots) + steps


def test_more_steps_than_the_table_of_lengths_knows():
    steps = int(lengths(1)[-1, 2]) + 1  # of the segment up to the one checkpoint
    assert steps**2 / 4 > evaluations(steps, fg.Loops(1, 1)) > evaluations(steps - 1, fg.Loops(1, 1))


def test_no_step_is_computed_twice_within_the_residual_steps():
    assert [evaluations(n, fg.Loops(4, 16)) for n in (0, 1, 16)] == [0, 1, 16]


@pytest.mark.parametrize(
    "wrong", [dict(checkpoints=0), dict(residual_steps=0), dict(checkpoints=2.0), dict(checkpoints=True)]
)
def test_options_are_counts(wrong):
    with pytest.raises(fg.OptionError, match=next(iter(wrong))):
        fg.Loops(**wrong)


def test_many_checkpoints_are_no_work_and_too_many_refused():
    root = lambda a: lax.while_loop(lambda x: jnp.abs(x * x - a) > 1e-6, lambda x: (x + a / x) / 2, a)
    assert_near(fg.grad(root, loops=fg.Loops(np.int64(10_000), 1))(4.0), 0.25, 1e-3)
    with pytest.raises(
        fg.OptionError, match=r"at most 10,000 checkpoints, and got 1,000,000\.\n  try     residual_steps"
    ):
        fg.Loops(checkpoints=1_000_000)


@pytest.mark.parametrize("wrong", [8, (8, 1), {"checkpoints": 3}, fg.Loops])
def test_loops_are_an_instance_of_Loops(wrong):
    for verb in (fg.grad, fg.vjp, fg.differentiable):
        with pytest.raises(fg.OptionError, match=r"loops= takes fg\.Loops\(\.\.\.\), and got "):
            verb(lambda x: x, *[1.0] * (verb is fg.vjp), loops=wrong)


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
    f.defjvp(lambda primals, given: jax.jvp(lambda w, x: 2 * step(w, x, N), primals, given))
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


@pytest.mark.parametrize("place", PLACES)
def test_loops_are_reversed_wherever_they_stand(place):
    by_hand = {"scan": lambda w, x: (lambda a, b, c: (c, (x, x, a, b)))(
        known(w, x, 1), known(w, known(w, x, 1), 2), known(w, known(w, known(w, x, 1), 2), 3)
    )}.get(place, lambda w, x: PLACES[place](known, w, x))  # fmt: skip
    assert_same_gradient(lambda w, x: PLACES[place](loop, w, x), by_hand, W, X)


def test_a_loop_in_a_loop():
    assert_same_gradient(lambda w, x: in_a_loop(loop, w, x), lambda w, x: nested(known, w, x), W, X)


def test_shards_of_a_mesh_may_differ_in_their_steps():
    """The cotangents of the weights that they share are summed once."""
    by_hand = lambda w, x: [known(w, row, n) for row, n in zip([x, x + 1, x - 1, 2 * x], (3, 0, 5, 9), strict=True)]
    want = jax.grad(lambda *a: total(by_hand(*a)), (0, 1))(W, X)
    assert_near(gradient(functools.partial(in_shard_map, loop), W, X), want, 1e-4)


def test_plain_jax_differentiates_a_differentiable_function():
    f = fg.differentiable(lambda w, x: total(loop(w, x, N)), loops=SMALL)
    want = jax.grad(lambda w, x: total(known(w, x, N)), (0, 1))(W, X)
    assert_near(jax.grad(f, (0, 1))(W, X), want, 1e-4)
    assert_near(jax.jacrev(f, (0, 1))(W, X), want, 1e-4)
    assert_near(jax.vjp(f, W, X)[1](1.0), want, 1e-4)


def test_where_no_gradient_flows_the_program_is_the_same():
    f = lambda x: jnp.sin(x) * lax.while_loop(lambda t: t < 10.0, lambda t: t * 2, lax.stop_gradient(x))
    programs = [jax.jit(m.grad(f)).lower(1.0).compile().as_text() for m in (jax, fg)]
    assert programs[0].count(" while(") == programs[1].count(" while(") == 1


def test_as_jax_where_the_length_is_known():
    f = lambda x: lax.fori_loop(0, 10, lambda k, x: jnp.sin(x), x)
    assert jax.make_jaxpr(fg.grad(f))(1.0).pretty_print() == jax.make_jaxpr(jax.grad(f))(1.0).pretty_print()


# ------------------------------------------------------------------------------------------------ derivatives and batches


DERIVATIVES = {
    "hessian": lambda m, f: m.hessian(f, 1)(W, X),
    "grad of grad": lambda m, f: m.grad(lambda w: total(m.grad(f)(w, X)))(W),
    "grad of grad of grad": lambda m, f: m.grad(
        lambda x: total(m.grad(lambda x: total(m.grad(f, 1)(W, x)))(x)))(X),
    "jvp of grad": lambda m, f: m.jvp(lambda x: m.grad(f, (0, 1))(W, x), (X,), (X,)),
    "grad of jvp": lambda m, f: m.grad(lambda w, x: m.jvp(lambda x: f(w, x), (x,), (x,))[1], (0, 1))(W, X),
    "vjp of vjp": lambda m, f: m.vjp(lambda ct: m.vjp(f, W, X)[1](ct), 2.0)[1]((W, X)),
    "jacrev of jacfwd": lambda m, f: m.jacrev(m.jacfwd(f, 1), 1)(W, X),
    "linearize of grad": lambda m, f: m.linearize(m.grad(f), W, X)[1](W, X),
    "grad of linearize": lambda m, f: m.grad(lambda x: m.linearize(lambda x: f(W, x), x)[1](X))(X),
}  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_derivatives(name, steps):
    of = lambda m, step: jax.jit(lambda: DERIVATIVES[name](m, lambda w, x: total(step(w, x, steps))))()
    small = Small(fg)
    assert_near(of(small, loop), of(jax, known), 2e-4)


class Small:
    """fg with few checkpoints."""

    def __init__(self, m):
        for name in ("grad", "hessian", "vjp", "jacrev"):
            setattr(self, name, functools.partial(getattr(m, name), loops=SMALL))
        self.jvp, self.jacfwd, self.linearize = m.jvp, m.jacfwd, m.linearize


STEPS = jnp.array([0, 3, 23, 7])
ROWS = jnp.stack([X, X + 1, X - 1, 2 * X])


def test_lanes_of_unequal_length():
    f = lambda w, x, n: total(loop(w, x, n))
    want = [jax.grad(lambda w, x, n=n: total(known(w, x, n)), (0, 1))(W, x) for x, n in zip(ROWS, STEPS, strict=True)]
    for batched in (fg.vmap, jax.vmap):
        got = jax.jit(batched(fg.grad(f, (0, 1), loops=SMALL), in_axes=(None, 0, 0)))(W, ROWS, STEPS)
        assert_near(got, jax.tree.map(lambda *x: jnp.stack(x), *want), 1e-4)
        mapped = lambda w, x, batched=batched: total(batched(loop, in_axes=(None, 0, 0))(w, x, STEPS))
        weights, rows = fg.grad(mapped, (0, 1), loops=SMALL)(W, ROWS)
        assert_near(weights, sum(w for w, _ in want), 1e-4)
        assert_near(rows, jnp.stack([x for _, x in want]), 1e-4)


def test_lanes_of_lanes():
    f = lambda x, n: total(loop(W, x, n))
    twice = lambda g: jax.vmap(jax.vmap(g))
    rows, steps = jnp.stack([ROWS, ROWS + 1]), jnp.stack([STEPS, STEPS + 2])
    want = jnp.stack([jnp.stack([jax.grad(lambda x, n=n: total(known(W, x, n)))(x) for x, n in zip(r, s, strict=True)])
                      for r, s in zip(rows, steps, strict=True)])  # fmt: skip
    assert_near(jax.jit(twice(fg.grad(f, loops=SMALL)))(rows, steps), want, 1e-4)
    assert_near(jax.jit(fg.grad(lambda r: jnp.sum(twice(f)(r, steps)), loops=SMALL))(rows), want, 1e-4)
    assert_near(
        jax.jit(jax.vmap(fg.grad(lambda r, s: jnp.sum(jax.vmap(f)(r, s)), loops=SMALL)))(rows, steps), want, 1e-4
    )


def test_hessians_of_lanes():
    f = lambda x, n: total(loop(W, x, n))
    got = jax.jit(jax.vmap(fg.hessian(f, loops=SMALL)))(ROWS, STEPS)
    want = [jax.hessian(lambda x, n=n: total(known(W, x, n)))(x) for x, n in zip(ROWS, STEPS, strict=True)]
    assert_near(got, jnp.stack(want), 2e-4)


def test_lanes_that_have_finished_do_no_harm():
    """At the state where the first lane stops, and at that where the second starts, the derivative of the step is infinite."""

    def f(a, x):
        return lax.while_loop(lambda x: x > 1, lambda x: a * jnp.sqrt(x - 1), x)

    a, x = jnp.array([1.0, 1.0, 0.5]), jnp.array([2.0, 1.0, 30.0])

    def by_hand(a, x):
        while x > 1:
            x = a * jnp.sqrt(x - 1)
        return x

    want = [jax.grad(by_hand, (0, 1))(*row) for row in zip(a, x, strict=True)]
    for form in (jax.vmap(fg.grad(f, (0, 1))), fg.grad(lambda a, x: jnp.sum(jax.vmap(f)(a, x)), (0, 1))):
        assert_near(form(a, x), jax.tree.map(lambda *v: jnp.stack(v), *want), 1e-5)
    shared = fg.grad(lambda a: jnp.sum(jax.vmap(f, (None, 0))(a, x)))(0.9)
    assert_near(shared, sum(jax.grad(by_hand)(0.9, row) for row in x), 1e-5)


def test_cotangents_of_lanes_are_batched():
    """A batch of cotangents, or of tangents, of a loop that is one of many lanes already."""

    def run(is_loop, x):
        steps = (0, 3, 7)
        if is_loop:
            return jax.vmap(lambda x, n: loop(W, x, n))(x, jnp.array(steps))
        return jnp.stack([known(W, row, n) for row, n in zip(x, steps, strict=True)])

    mixed = jax.random.normal(jax.random.key(8), (2, 3))
    f, by_hand = (lambda x, is_loop=is_loop: mixed @ run(is_loop, x) @ W for is_loop in (True, False))
    x = ROWS[:3]
    assert_near(fg.jacrev(f, loops=SMALL)(x), jax.jacrev(by_hand)(x), 1e-4)
    scalar = lambda g: lambda w: jnp.sum(g(w * x)) ** 2
    assert_near(fg.hessian(scalar(f), loops=SMALL)(1.0), jax.hessian(scalar(by_hand))(1.0), 1e-3)


@pytest.mark.parametrize("residual_steps", [1, 2])
def test_lanes_that_have_finished_stay_with_their_own_constants(residual_steps):
    """One lane's constant with another's state has no finite derivative, and an inner loop that does not end."""

    def f(c, x):
        halved = lambda v: lax.while_loop(lambda v: v > c, lambda v: c + (v - c) / 2 - 0.1, v)
        return lax.while_loop(lambda x: x > c, lambda x: halved(x - jnp.sqrt(x - c)), x)

    loops = fg.Loops(2, residual_steps)
    c, x = jnp.array([5.0, 1.0, -3.0]), jnp.array([7.0, 30.0, 100.0])
    want = jax.vmap(jax.jacfwd(f))(c, x)
    assert jnp.all(jnp.isfinite(want))
    assert_near(jax.vmap(fg.grad(f, loops=loops))(c, x), want, 1e-4)
    assert_near(fg.grad(lambda c: jnp.sum(jax.vmap(f)(c, x)), loops=loops)(c), want, 1e-4)
    assert_near(fg.jacrev(lambda c: jax.vmap(f)(c, x), loops=loops)(c), jnp.diag(want), 1e-4)


def test_lanes_without_a_step_read_the_constants_of_another():
    f = lambda c, x: lax.while_loop(lambda x: x > c, lambda x: x - jnp.sqrt(x - c) - 0.1, x)
    c, x = jnp.array([50.0, 1.0]), jnp.array([7.0, 30.0])
    want = jnp.stack([jax.jacfwd(f)(*row) for row in zip(c, x, strict=True)])
    assert_near(jax.vmap(fg.grad(f))(c, x), want, 1e-5)
    twice = jnp.stack([jax.jacfwd(jax.jacfwd(f))(*row) for row in zip(c, x, strict=True)])
    assert_near(jax.vmap(fg.hessian(f))(c, x), twice, 1e-4)
    assert_near(fg.grad(lambda c: jnp.sum(jax.vmap(fg.grad(f))(c, x)))(c), twice, 1e-4)


def test_a_lane_without_a_step_does_not_run_loops_with_the_state_of_another():
    """For its own constant, 0, the inner loop ends at its own state, 0, alone."""

    def f(c, x):
        inner = lambda v: lax.while_loop(lambda v: v > 0, lambda v: v - c, v)
        return lax.while_loop(lambda t: (t[0] < 1) & (c > 0), lambda t: (t[0] + 1, inner(t[1]) * c), (0, x))[1]

    c, x = jnp.array([0.0, 1.0]), jnp.array([0.0, 3.5])
    want = jnp.stack([jax.jacfwd(f)(*row) for row in zip(c, x, strict=True)])
    assert_near(jax.vmap(fg.grad(f))(c, x), want, 1e-6)
    assert_near(fg.grad(lambda c: jnp.sum(jax.vmap(f)(c, x)))(c), want, 1e-6)


@pytest.mark.usefixtures("fresh_heap")
def test_a_long_body_is_cut_in_linear_time():
    def body(x, y, lines):
        for _ in range(lines):
            x, y = x * (y + 0.5), y - x * 0.01
        return x, y

    def seconds(lines):
        f = lambda x, n: lax.fori_loop(0, n, lambda _, c: body(*c, lines), (x, x))[0]
        before = time.process_time()
        jax.jit(fg.grad(f)).trace(1.0, 3)
        return time.process_time() - before

    seconds(10)
    assert seconds(480) < 12 * seconds(80)


def test_no_lanes():
    f = lambda x, n: total(loop(W, x, n))
    assert jax.vmap(fg.grad(f))(jnp.zeros((0, 4)), jnp.zeros(0, int)).shape == (0, 4)


BODIES = {
    "silu": jax.nn.silu,
    "where": lambda x: jnp.where(x > 0.5, jnp.sin(x), x * x),
    "jit": jax.jit(lambda x: jnp.sin(x) * x),
    "remat": jax.checkpoint(lambda x: jnp.sin(x) * x),
    "cond": lambda x: lax.cond(jnp.sum(x) > 0, lambda x: jnp.sin(x) * x, lambda x: x, x),
    "scan": lambda x: lax.scan(lambda c, _: (jnp.sin(c) * x, None), x, None, length=2)[0],
    "while": lambda x: lax.fori_loop(0, jnp.int32(jnp.sum(x) > -9) + 1, lambda _, c: jnp.sin(c) * x, x),
    "norm": lambda x: x / jnp.linalg.norm(x) + 0.1 * x,
    "solve": lambda x: jnp.linalg.solve(W + 3 * jnp.eye(4), x) + jnp.sin(x),
    "sort": lambda x: jnp.sort(jnp.sin(x)) * x,
}


@pytest.mark.parametrize("name", BODIES)
def test_second_derivatives_of_bodies_with_sub_graphs(name):
    f = lambda x, n: lax.while_loop(lambda t: t[0] < n, lambda t: (t[0] + 1, BODIES[name](t[1])), (0, x))[1]

    def by_hand(x, n):
        for _ in range(n):
            x = BODIES[name](x) if name != "while" else jnp.sin(jnp.sin(x) * x) * x
        return x

    twice = lambda m, g, **o: m.grad(lambda x: total(m.grad(lambda x: total(g(x, 5)), **o)(x)), **o)(X)
    assert_near(jax.jit(lambda: twice(fg, f, loops=SMALL))(), jax.jit(lambda: twice(jax, by_hand))(), 1e-3)


def test_arrays_that_differ_in_the_middle_are_not_one():
    with jax.numpy_rank_promotion("raise"):
        a, b = np.ones((2, 5000), np.float32)
        b[2500] = 3
        f = lambda x: lax.while_loop(
            lambda t: t[0] < 3, lambda t: (t[0] + 1, jnp.sin(t[1] * a) + jnp.sin(t[1] * b)), (0, x)
        )[1]
        x = jnp.full(5000, 0.3)

        def by_hand(x):
            for _ in range(3):
                x = jnp.sin(x * a) + jnp.sin(x * b)
            return x

        assert_near(fg.grad(lambda x: total(f(x)))(x), jax.grad(lambda x: total(by_hand(x)))(x), 1e-5)


def test_jacobians():
    f, by_hand = (lambda x, step=step: step(W, x, N) for step in (loop, known))
    assert_near(jax.jit(fg.jacrev(f, loops=SMALL))(X), jax.jacrev(by_hand)(X), 1e-4)
    assert_near(jax.jit(fg.jacfwd(f))(X), jax.jacfwd(by_hand)(X), 1e-4)


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
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_dtypes(dtype):
    w, x = W.astype(dtype), X.astype(dtype)
    real = lambda step: lambda w, x: jnp.sum(jnp.real(step(w, x, N) * jnp.conj(step(w, x, N)))).astype(jnp.float32)
    got = jax.jit(fg.grad(real(loop), (0, 1), loops=SMALL))(w, x)
    want = jax.jit(jax.grad(real(known), (0, 1)))(w, x)
    assert [x.dtype for x in got] == [dtype, dtype]
    assert_near(
        *(jax.tree.map(lambda x: x.astype(jnp.promote_types(dtype, jnp.float32)), t) for t in (got, want)), 3e-2
    )


def test_double_precision():
    with jax.enable_x64(True):
        w, x = jnp.asarray(W, float), jnp.asarray(X, float)
        want = jax.grad(lambda w, x: total(known(w, x, N)), (0, 1))(w, x)
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
    want = jax.value_and_grad(lambda w, x: total(known(w, x, N)), (0, 1))(W, X)
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


def test_prints_are_repeated_with_the_steps_that_are_computed_again():
    seen = []

    def f(x, n):
        def step(t):
            jax.debug.callback(lambda k: seen.append(int(k)), t[0])
            return t[0] + 1, jnp.sin(t[1])

        return lax.while_loop(lambda t: t[0] < n, step, (0, x))[1]

    for n in (3, 20):
        seen.clear()
        jax.block_until_ready(jax.jit(fg.grad(f))(0.5, n))
        jax.effects_barrier()
        assert collections.Counter(seen) == dict.fromkeys(range(n), evaluations(n, fg.Loops()) // n)


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
    np.testing.assert_allclose(fg.grad(newton)(7.0), 0.5 / 7**0.5, rtol=1e-4)
    np.testing.assert_allclose(fg.grad(fg.grad(newton))(7.0), -0.25 / 7**1.5, rtol=1e-3)
    a = jnp.array([0.1, 1.0, 2.0, 50.0])
    np.testing.assert_allclose(jax.vmap(fg.grad(newton))(a), 0.5 / a**0.5, rtol=1e-4)


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
    assert_near(fg.grad(lambda w: pagerank(w)[2])(weights), jax.grad(solved)(weights), 1e-3)


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

    assert_near(fg.grad(value)(cost), sinkhorn(cost), 1e-3)


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
    np.testing.assert_allclose(fg.grad(decay)(2.0), -jnp.exp(-2.0), rtol=1e-2)


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
    assert_near(orthogonal(W), by_qr(W), 1e-3)
    want = jax.grad(lambda m: jnp.sum(weights * by_qr(m)))(W)
    assert_near(fg.grad(lambda m: jnp.sum(weights * orthogonal(m)), loops=SMALL)(W), want, 2e-3)


def test_rejection_sampling():
    """A draw from a normal of width s that is cut at 1, by rejection: its derivative is that of the draw that was kept."""

    def sample(s, key):
        def step(t):
            key, sub = jax.random.split(t[0])
            return key, s * jax.random.normal(sub)

        return lax.while_loop(lambda t: jnp.abs(t[1]) > 1, step, (key, jnp.inf))[1]

    for seed in range(5):
        x, slope = fg.value_and_grad(sample)(3.0, jax.random.key(seed))
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
        goes = lambda t: (t[1] != 0) & (t[3] < 20)
        if not unrolled:
            return lax.while_loop(goes, step, state)[2]
        while goes(state):
            state = step(state)
        return state[2]

    assert_near(fg.grad(said)(params, False), jax.grad(said)(params, True), 1e-3)


def test_residuals_that_are_cheap_to_compute_from_others_are_not_kept():
    """Of tanh(x @ w) a step keeps x and the tanh, not what the derivative of tanh makes of it."""
    w, x = jnp.eye(64) / 2, jnp.ones((64, 64))

    def temporaries(residual_steps):
        f = lambda w, n: jnp.sum(
            lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]
        )
        compiled = jax.jit(fg.grad(f, loops=fg.Loops(1, residual_steps))).lower(w, 3).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(32) - temporaries(16) <= 16 * 2.1 * x.nbytes


def test_the_insides_of_a_differentiable_loop_are_seen_and_changed():
    f = fg.differentiable(lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1])
    x = X / 100  # so small that arcsin is the inverse of sin
    graph = fg.trace(f, x)
    _, seen = fg.tap(graph, where=fg.op("sin"))(x)
    (value, ran) = seen["sin#0"]
    assert ran
    assert_near(value, jnp.sin(jnp.sin(jnp.sin(x))), 1e-6)
    for doubled in (
        fg.rewrite(graph, {lax.sin_p: lambda eqn, x: 2 * x}),
        fg.patch(graph, where=fg.op("sin"), replace=lambda y: jnp.arcsin(y) * 2),
        fg.replace(graph, jnp.sin, lambda x: 2 * x),
    ):
        assert_near(doubled(x), 8 * x, 1e-5)
        assert_near(jax.grad(lambda x: jnp.sum(doubled(x)))(x), jnp.full_like(x, 8.0), 1e-5)
