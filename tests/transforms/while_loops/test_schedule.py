"""The schedule of checkpoints: how often the body runs, beside the optimum."""

from __future__ import annotations

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.while_loops.schedule import evaluations, lengths
from jax import lax

import funcgrad as fg

from ...checks import assert_near
from ...sampling import sampled

GRID = list(itertools.product([1, 2, 5, 32], [1, 3, 16]))


@pytest.mark.parametrize("grid", sampled(GRID, ["(1, 1)", "(2, 3)", "(5, 1)", "(32, 16)"]))
def test_the_body_is_computed_as_often_as_the_schedule_says(grid):
    calls = collections.Counter()

    @jax.custom_jvp
    def counted(x):
        return jax.pure_callback(lambda x: calls.update(["body"]) or np.sin(x), x, x)

    counted.defjvp(lambda primals, tangents: ((out := counted(*primals)), tangents[0] * out))
    loops = fg.Loops(*grid)

    def f(x, n):
        return lax.while_loop(lambda t: t[0] < n, lambda t: (t[0] + 1, counted(t[1]) + t[1] / 2), (0, x))[1]

    derive = jax.jit(fg.grad(f, loops=loops))
    for n in (0, 1, 2, 3, 7, 16, 17, 50, 64):
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

    for slots in (4, 8, 32, 100):
        for steps in (50, 200, 1000):
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
