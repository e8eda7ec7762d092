"""The reversed loop: derivatives of derivatives, lanes of unequal length, and what a step keeps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

from ...checks import assert_near, temp_bytes
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


# ------------------------------------------------------------------------------------------------ derivatives and batches


def masked(w, x, n, most=25):
    """As `loop` of at most so many steps, in a form that JAX reverses."""
    return lax.scan(lambda x, k: (jnp.where(k < n, body(w, x), x), None), x, jnp.arange(most))[0]


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


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_derivatives(name):
    of = lambda m, step: jax.jit(lambda n: DERIVATIVES[name](m, lambda w, x: total(step(w, x, n))))
    got, want = of(Small(fg), loop), of(jax, functools.partial(masked, most=7))
    for steps in (0, 1, 7):
        assert_near(got(steps), want(steps), 2e-4)


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
    want = jax.jit(jax.vmap(jax.grad(lambda w, x, n: total(masked(w, x, n)), (0, 1)), (None, 0, 0)))(W, ROWS, STEPS)
    for batched in (fg.vmap, jax.vmap):
        got = jax.jit(batched(fg.grad(f, (0, 1), loops=SMALL), in_axes=(None, 0, 0)))(W, ROWS, STEPS)
        assert_near(got, want, 1e-4)
        mapped = lambda w, x, batched=batched: total(batched(loop, in_axes=(None, 0, 0))(w, x, STEPS))
        weights, rows = jax.jit(fg.grad(mapped, (0, 1), loops=SMALL))(W, ROWS)
        assert_near((weights, rows), (want[0].sum(0), want[1]), 1e-4)


def test_lanes_of_lanes():
    f = lambda x, n: total(loop(W, x, n))
    twice = lambda g: jax.vmap(jax.vmap(g))
    rows, steps = jnp.stack([ROWS, ROWS + 1]), jnp.stack([STEPS, STEPS + 2])
    want = jax.jit(twice(jax.grad(lambda x, n: total(masked(W, x, n)))))(rows, steps)
    assert_near(jax.jit(twice(fg.grad(f, loops=SMALL)))(rows, steps), want, 1e-4)
    assert_near(jax.jit(fg.grad(lambda r: jnp.sum(twice(f)(r, steps)), loops=SMALL))(rows), want, 1e-4)
    assert_near(
        jax.jit(jax.vmap(fg.grad(lambda r, s: jnp.sum(jax.vmap(f)(r, s)), loops=SMALL)))(rows, steps), want, 1e-4
    )


def test_hessians_of_lanes():
    f = lambda x, n: total(loop(W, x, n))
    got = jax.jit(jax.vmap(fg.hessian(f, loops=SMALL)))(ROWS, STEPS)
    want = jax.jit(jax.vmap(jax.hessian(lambda x, n: total(masked(W, x, n)))))(ROWS, STEPS)
    assert_near(got, want, 2e-4)


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
        assert_near(jax.jit(form)(a, x), jax.tree.map(lambda *v: jnp.stack(v), *want), 1e-5)
    shared = fg.grad(lambda a: jnp.sum(jax.vmap(f, (None, 0))(a, x)))(0.9)
    assert_near(shared, sum(jax.grad(by_hand)(0.9, row) for row in x), 1e-5)


def test_cotangents_of_lanes_are_batched():
    """A batch of cotangents, or of tangents, of a loop that is one of many lanes already."""

    def run(is_loop, x):
        steps = (0, 3, 7)
        if is_loop:
            return jax.vmap(lambda x, n: loop(W, x, n))(x, jnp.array(steps))
        return jnp.stack([counted(W, row, n) for row, n in zip(x, steps, strict=True)])

    mixed = jax.random.normal(jax.random.key(8), (2, 3))
    f, by_hand = (lambda x, is_loop=is_loop: mixed @ run(is_loop, x) @ W for is_loop in (True, False))
    x = ROWS[:3]
    assert_near(jax.jit(fg.jacrev(f, loops=SMALL))(x), jax.jit(jax.jacrev(by_hand))(x), 1e-4)
    scalar = lambda g: lambda w: jnp.sum(g(w * x)) ** 2
    hessians = fg.hessian(scalar(f), loops=SMALL), jax.hessian(scalar(by_hand))
    assert_near(*(jax.jit(hessian)(1.0) for hessian in hessians), 1e-3)


@pytest.mark.parametrize("residual_steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lanes_that_have_finished_stay_with_their_own_constants(residual_steps):
    """One lane's constant with another's state has no finite derivative, and an inner loop that does not end."""

    def f(c, x):
        halved = lambda v: lax.while_loop(lambda v: v > c, lambda v: c + (v - c) / 2 - 0.1, v)
        return lax.while_loop(lambda x: x > c, lambda x: halved(x - jnp.sqrt(x - c)), x)

    loops = fg.Loops(2, residual_steps)
    c, x = jnp.array([5.0, 1.0, -3.0]), jnp.array([7.0, 30.0, 100.0])
    want = jax.vmap(jax.jacfwd(f))(c, x)
    assert jnp.all(jnp.isfinite(want))
    assert_near(jax.jit(jax.vmap(fg.grad(f, loops=loops)))(c, x), want, 1e-4)
    assert_near(jax.jit(fg.grad(lambda c: jnp.sum(jax.vmap(f)(c, x)), loops=loops))(c), want, 1e-4)
    assert_near(jax.jit(fg.jacrev(lambda c: jax.vmap(f)(c, x), loops=loops))(c), jnp.diag(want), 1e-4)


def test_lanes_without_a_step_read_the_constants_of_another():
    f = lambda c, x: lax.while_loop(lambda x: x > c, lambda x: x - jnp.sqrt(x - c) - 0.1, x)
    c, x = jnp.array([50.0, 1.0]), jnp.array([7.0, 30.0])
    want = jnp.stack([jax.jacfwd(f)(*row) for row in zip(c, x, strict=True)])
    assert_near(jax.jit(jax.vmap(fg.grad(f)))(c, x), want, 1e-5)
    second = jax.jit(jax.jacfwd(jax.jacfwd(f)))
    twice = jnp.stack([second(*row) for row in zip(c, x, strict=True)])
    assert_near(jax.jit(jax.vmap(fg.hessian(f)))(c, x), twice, 1e-4)
    assert_near(jax.jit(fg.grad(lambda c: jnp.sum(jax.vmap(fg.grad(f))(c, x))))(c), twice, 1e-4)


def test_a_lane_without_a_step_does_not_run_loops_with_the_state_of_another():
    """For its own constant, 0, the inner loop ends at its own state, 0, alone."""

    def f(c, x):
        inner = lambda v: lax.while_loop(lambda v: v > 0, lambda v: v - c, v)
        return lax.while_loop(lambda t: (t[0] < 1) & (c > 0), lambda t: (t[0] + 1, inner(t[1]) * c), (0, x))[1]

    c, x = jnp.array([0.0, 1.0]), jnp.array([0.0, 3.5])
    want = jnp.stack([jax.jacfwd(f)(*row) for row in zip(c, x, strict=True)])
    assert_near(jax.jit(jax.vmap(fg.grad(f)))(c, x), want, 1e-6)
    assert_near(jax.jit(fg.grad(lambda c: jnp.sum(jax.vmap(f)(c, x))))(c), want, 1e-6)


def test_the_gradient_of_a_long_body_has_as_many_equations_for_each_line():
    def body(x, y, lines):
        for _ in range(lines):
            x, y = x * (y + 0.5), y - x * 0.01
        return x, y

    def equations(lines):
        f = lambda x, n: lax.fori_loop(0, n, lambda _, c: body(*c, lines), (x, x))[0]
        return sum(1 for _ in fg.walk(fg.trace(fg.grad(f), 1.0, 3)))

    few, more, most = (equations(lines) for lines in (10, 40, 70))
    assert most - more == more - few


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


@pytest.mark.parametrize("name", sampled(BODIES, ["where", "jit", "remat", "cond", "solve"]))
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
    f, by_hand = (lambda x, step=step: step(W, x, N) for step in (loop, counted))
    assert_near(jax.jit(fg.jacrev(f, loops=SMALL))(X), jax.jacrev(by_hand)(X), 1e-4)
    assert_near(jax.jit(fg.jacfwd(f))(X), jax.jacfwd(by_hand)(X), 1e-4)


def test_residuals_that_are_cheap_to_compute_from_others_are_not_kept():
    """Of tanh(x @ w) a step keeps x and the tanh, not what the derivative of tanh makes of it."""
    w, x = jnp.eye(64) / 2, jnp.ones((64, 64))

    def temporaries(residual_steps):
        f = lambda w, n: jnp.sum(
            lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]
        )
        return temp_bytes(fg.grad(f, loops=fg.Loops(1, residual_steps)), w, 3)

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
