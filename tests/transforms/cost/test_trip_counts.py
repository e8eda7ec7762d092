"""How often loops and branches run: as many trips as are known, given or measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from funcgrad.transforms.while_loops.schedule import evaluations
from jax import lax

import funcgrad as fg

# ------------------------------------------------------------------------------------------------ by hand

W, X = jnp.full((8, 8), 0.1), jnp.ones((4, 8))
PRODUCT = 2 * 4 * 8 * 8


def test_what_jax_counts_once_counts_as_often_as_it_runs():
    body = lambda c, _: (c @ W, None)
    f = lambda x: lax.scan(body, x, None, length=10)[0]
    assert fg.cost(f, X).flops == 10 * PRODUCT
    assert jax.jit(f).lower(X).compile().cost_analysis()["flops"] < 2 * PRODUCT  # what this is for
    nested = lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0]
    assert fg.cost(nested, X).flops == 30 * PRODUCT
    assert fg.cost(jax.vmap(f), jnp.stack([X] * 5)).flops == 50 * PRODUCT


def loop(x, n):
    with jax.named_scope("solver"):
        return lax.fori_loop(0, n, lambda k, x: x @ W, x)


def test_a_loop_of_unknown_length_counts_as_one_trip_and_says_so():
    unknown = fg.cost(loop, X, 7)
    step = PRODUCT + 1  # and the counter
    assert unknown.flops == step + 1  # and the comparison
    assert len(unknown.endless) == 1
    assert "(loop)" in unknown.endless[0]
    assert "as one trip" in str(unknown)
    for trips in (7, {"solver": 7}, {"while": 7}, {"solver/while": 7}, "measured"):
        counted = fg.cost(loop, X, 7, trips=trips)
        assert counted.flops == 7 * step + 8
        assert not counted.endless
    assert fg.cost(loop, X, 7, trips=0).flops == 1
    with pytest.raises(ValueError, match=r"trips= names 'sover', where there is none[\s\S]*there are solver/while"):
        fg.cost(loop, X, 7, trips={"sover": 7})
    with pytest.raises(ValueError, match="trips= takes a number, a mapping or"):
        fg.cost(loop, X, 7, trips="measure")


def test_trips_are_measured_wherever_a_loop_stands():
    inner = lambda x, n: lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] @ W), (0, x))[1]

    def f(x, lengths):
        x, _ = lax.scan(lambda x, n: (inner(x, n), None), x, lengths)
        return jax.jit(jax.vmap(inner))(jnp.stack([x, x]), lengths[:2]), lax.cond(
            x[0, 0] > 9, inner, lambda x, n: x, x, 3
        )

    measured = fg.cost(f, X, jnp.array([2, 3, 7]), trips="measured")
    products = [row for row in measured.rows if row.eqn.primitive.name == "dot_general"]
    assert [row.times for row in products] == [3 * 4, 3, 0] or [row.times for row in products] == [3 * 4, 3, 1]


@pytest.mark.parametrize("n", [3, 40])
def test_a_loop_that_is_reversed(n):
    """Every step as often as `schedule.evaluations` says, forward and again, and its pull-back once."""
    loops = fg.Loops(checkpoints=4, residual_steps=8)
    f = lambda x: jnp.sum(lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, jnp.sin(s[1] @ W)), (0, x))[1])
    graph = fg.grad(fg.trace(f, X), loops=loops)
    cost = fg.cost(graph, trips=n)
    products = sum(row.work.flops for row in cost.rows if row.eqn.primitive.name == "dot_general")
    assert products == (evaluations(n, loops) + n) * PRODUCT
    assert not cost.endless
    measured = fg.cost(graph, X, trips="measured")
    assert measured.work == cost.work
    once = fg.cost(graph)
    assert len(once.endless) >= 1
    assert sum(row.work.flops for row in once.rows if row.eqn.primitive.name == "dot_general") == 3 * PRODUCT


def test_branches():
    f = lambda p, x: lax.cond(p, lambda x: x @ W @ W, lambda x: x @ W, x)
    branches = fg.cost(f, True, X)
    assert branches.flops == 2 * PRODUCT + 1  # the predicate becomes an index
    (branch,) = branches.branches
    assert [w.flops for w in branch.work] == [PRODUCT, 2 * PRODUCT]
    assert branch.weights == (0, 1)
    for probabilities in ((0.75, 0.25), {"cond": (0.75, 0.25)}):
        assert fg.cost(f, True, X, probabilities=probabilities).flops == 1.25 * PRODUCT + 1
    with pytest.raises(ValueError, match=r"probabilities= gives \[1\] to a cond of 2 branches"):
        fg.cost(f, True, X, probabilities=(1,))
    with pytest.raises(ValueError, match=r"probabilities= names 'switch', where there is none"):
        fg.cost(f, True, X, probabilities={"switch": (0.5, 0.5)})


# ------------------------------------------------------------------------------------------------ memory


def test_parameters_that_only_a_loop_reads_count_in_its_gradient_too():
    f = lambda a, n: jnp.sum(lax.fori_loop(0, n, lambda _, x: jnp.tanh(a @ x), jnp.ones(64)))
    assert fg.cost(f, jnp.eye(64), 9).parameters == fg.cost(fg.grad(f), jnp.eye(64), 9).parameters == 64 * 64
