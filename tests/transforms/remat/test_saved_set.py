"""What the simulation of a choice counts, and what the search finds with it."""

from __future__ import annotations

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.cost.backends import BACKENDS
from funcgrad.transforms.remat import joint, plan, policy, saved_set
from funcgrad.transforms.remat.candidates import Config, Proposal
from funcgrad.transforms.remat.device_model import DEVICE_MODELS
from funcgrad.transforms.remat.scan_bodies import Scan
from funcgrad.transforms.while_loops.schedule import Loops
from jax import lax

import funcgrad as fg

from ... import trainings
from ...checks import temp_bytes
from ...sampling import sampled
from .test_plan import unrolled

NARROW, WIDE = jax.ShapeDtypeStruct((64, 64), jnp.float32), 4096
INNER = 64 * WIDE * 4


def planner_of(f, *args):
    options = dict(argnums=0, has_aux=False, holomorphic=False, allow_int=False, reduce_axes=())
    return plan._planner(jax.value_and_grad, f, args, {}, options, None, {})[0]


def searched(f, *args):
    planner = planner_of(f, *args)
    return planner, planner.trace(Config((), Loops()))


def passing(x):
    """Layers with a wide product inside, which no backward pass reads."""
    a, b = np.full((64, WIDE), 0.01, np.float32), np.full((WIDE, 64), 0.01, np.float32)
    for _ in range(6):
        x = jnp.tanh((x @ a) @ b)
    return jnp.sum(x**2)


@unrolled
def test_what_is_read_on_the_way_alone_is_not_counted_together():
    planner, traced = searched(passing, NARROW)
    choice = policy.Policy(saved_set.pinned(traced.joint))
    outcome = traced.search.simulate(choice, 0)
    assert INNER < outcome.peak < 2 * INNER
    candidate = planner._compiled(Proposal(traced, choice, outcome.seconds, outcome.peak))
    assert candidate.bytes == pytest.approx(outcome.peak, rel=0.2)


@unrolled
def test_what_only_the_value_needs_takes_no_room_in_its_gradient():
    def f(ws, x):
        x = functools.reduce(lambda x, w: jnp.tanh(x @ w), ws, x)
        return jnp.mean(x**2) + lax.stop_gradient(jnp.mean(jnp.sort(jnp.outer(x[:, 0], x[:, 1]))))

    args = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 16, jax.ShapeDtypeStruct((2000, 64), jnp.float32)
    assert temp_bytes(fg.grad(f, memory="60%"), *args) <= 0.6 * temp_bytes(jax.grad(f), *args)


@unrolled
@pytest.mark.parametrize("memory", sampled(["50%", "30%"], ["50%"]))
def test_a_gradient_without_its_value_costs_no_more(memory):
    """Nothing that it returns needs the function to be computed, yet what is kept does."""
    loss, args = trainings.mlp(lambda layer: layer, depth=6, width=64, batch=256)
    extra = [fg.cost(m(loss, memory=memory), *args).flops for m in (fg.grad, fg.value_and_grad)]
    default = [fg.cost(m(loss), *args).flops for m in (jax.grad, jax.value_and_grad)]
    grad, both = (a / b - 1 for a, b in zip(extra, default, strict=True))
    assert grad <= both + 0.01
    assert fg.cost(fg.grad(loss, memory="100%"), *args).flops == default[0]


def test_a_function_that_keeps_nothing_is_refused_what_its_gradient_takes_itself():
    def linear(x):
        for _ in range(4):
            x = x @ np.full((64, 512), 0.01, np.float32) @ np.full((512, 64), 0.01, np.float32)
        return jnp.sum(x)

    x = jnp.ones((64, 64))
    np.testing.assert_allclose(fg.grad(linear, memory="100%")(x), jax.grad(linear)(x), rtol=1e-6)
    with pytest.raises(fg.BudgetError):
        fg.grad(linear, memory="60%")(x)


def resnet(**sizes):
    return trainings.resnet(lambda layer: layer, **sizes)


def test_some_of_what_is_computed_again_is_held():
    """Between holding all of it, which does not fit, and nothing, which costs several times as much."""
    loss, args = resnet(depth=6, channels=16, size=16, batch=16)
    _, traced = searched(loss, *args)
    results = traced.search
    budget = 0.95 * min(results.simulate(s, 0).peak for s in results.starts if s.retained is None)
    choice, outcome = results.best(budget)
    assert outcome.peak <= budget
    assert choice.retained
    extremes = [results.refilled(s, budget) for s in results.starts if s.retained == frozenset()]
    nothing = [
        o.seconds for s in extremes if (o := results.simulate(s._replace(retained=frozenset()), budget)).peak <= budget
    ]
    assert outcome.seconds < 0.5 * min(nothing)


def test_a_smaller_budget_never_gets_a_cheaper_choice():
    loss, args = resnet(depth=4, channels=8, size=8, batch=4)
    _, traced = searched(loss, *args)
    whole = traced.search.simulate(policy.Policy(saved_set.everything(traced.joint)), 0).peak
    results = [traced.search.best(part * whole) for part in np.linspace(0.2, 1, 9)]
    seconds = [outcome.seconds for _, outcome in filter(None, results)]
    assert len(seconds) > 4
    assert all(more <= 1.05 * less for less, more in pairwise(seconds))


@pytest.mark.parametrize("f", [lambda x: x @ x, lambda x: jnp.exp(x @ x + x @ x.T)])
def test_a_mask_of_what_has_memory_needs_none(f):
    """On GPU: what two read is not computed again where it is a product, or expensive."""

    def program(x, y):
        z = f(x)
        mask = z > 1
        return jnp.where(mask, z, 0.0) @ y, jnp.where(mask, y, 0.0) @ x

    jaxpr = jax.make_jaxpr(program)(jnp.ones((64, 64)), jnp.ones((64, 64))).jaxpr
    masks = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "gt"]
    assert masks
    assert not joint._buffered(jaxpr, BACKENDS["gpu"]) & set(map(id, masks))


def test_large_products_on_gpus_have_room_to_work_in():
    closed = jax.make_jaxpr(lambda x: x @ x)(jax.ShapeDtypeStruct((512, 512), jnp.float32))
    room = [sum(joint.Joint(closed, BACKENDS[p], DEVICE_MODELS[p]).inner_bytes) for p in ("cpu", "gpu")]
    assert room == [0, 2**25]


def test_a_scan_with_nothing_to_choose_is_left_alone():
    f = lambda x: jnp.sum(lax.scan(lambda c, y: (c + y, None), x, jnp.stack([x, 2 * x]))[0] ** 2)
    assert not planner_of(f, NARROW).scans


def test_barriers_in_bodies_count_where_they_part_kernels():
    """On GPU: what a step computes again is computed at once, where that fits."""
    f = lambda w, xs: jnp.sum(lax.scan(lambda c, x: (jnp.tanh(jnp.tanh(c @ w) @ w) + x, None), xs[0], xs)[0])
    (eqn,) = (
        e for e in jax.make_jaxpr(f)(jnp.ones((64, 64)), jnp.ones((20, 32, 64))).eqns if e.primitive.name == "scan"
    )
    scan = Scan(eqn, BACKENDS["gpu"], DEVICE_MODELS["gpu"])
    cheapest = next(o for o in scan.policies if not o.policy.saved)
    assert not cheapest.policy.is_staged
    staged = scan._scan_policy(cheapest.policy._replace(is_staged=True), cheapest.lengths)
    assert staged.bytes <= cheapest.bytes
    assert staged.seconds > cheapest.seconds
