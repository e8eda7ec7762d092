"""Every way to run a scan within a budget, and every choice of what is kept: JAX's own values."""

from __future__ import annotations

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.remat import plan, policy, saved_set
from funcgrad.transforms.remat.candidates import Config, Proposal
from funcgrad.transforms.remat.scan_bodies import ScanPolicy
from funcgrad.transforms.while_loops.schedule import Loops
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ...checks import assert_close_values, options, summed
from ...corpus import CORPUS, REVERSE
from ...sampling import sampled
from ...trainings import trainings
from .test_program import sevenfold, threefold

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)
W, C, XS = normal(5, 5), normal(3, 5), normal(12, 3, 5)

SCANS = {}


def scan(f):
    SCANS[f.__name__] = f
    return f


def planner_of(f, args, **options):
    options = dict(argnums=0, has_aux=False, holomorphic=False, allow_int=False, reduce_axes=()) | options
    return plan._planner(jax.value_and_grad, f, args, {}, options, None, {})


tanh = lambda w: lambda c, x: (jnp.tanh(c @ w) + x, jnp.sin(c))


@scan
def reverse(w, xs):
    return jnp.sum(lax.scan(tanh(w), C, xs, reverse=True)[1])


@scan
def without_slices(w, xs):
    return jnp.sum(lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), xs[0], None, length=12)[1])


@scan
def without_carry(w, xs):
    return jnp.sum(lax.scan(lambda _, x: (None, jnp.tanh(jnp.tanh(x @ w) @ w)), None, xs)[1])


@scan
def integers(w, xs):
    def step(carry, slices):
        (n, h), (x, k) = carry, slices
        return (n + 1 + k, jnp.tanh(h @ w) * (n.astype(jnp.float32) / 16) + x), (n, h, k)

    (_, h), (ns, hs, _) = lax.scan(step, (jnp.int32(0), C), (xs, jnp.arange(12) % 3))
    return jnp.sum(hs) + jnp.sum(h) + jnp.sum(ns.astype(jnp.float32))


@scan
def one_step(w, xs):
    return jnp.sum(lax.scan(tanh(w), C, xs[:1])[0])


@scan
def prime(w, xs):
    return jnp.sum(lax.scan(tanh(w), C, xs[:11])[0])


@scan
def prime_and_reverse(w, xs):
    (h, n), ys = lax.scan(
        lambda c, x: ((jnp.tanh(c[0] @ w) + x, c[1] + 1), (c[0] * x, c[1])), (C, 0), xs[:11], reverse=True
    )
    return jnp.sum(h) + jnp.sum(ys[0] * ys[1][:, None, None]) + n


@scan
def nested(w, xs):
    def outer(c, xs):
        c, ys = lax.scan(tanh(w), c, xs)
        return c, ys.sum()

    c, ys = lax.scan(outer, C, xs.reshape(4, 3, 3, 5))
    return jnp.sum(c) + jnp.sum(ys)


@scan
def in_a_branch(w, xs):
    return lax.cond(xs[0, 0, 0] > -99, lambda: without_slices(w, xs), lambda: jnp.float32(0))


@scan
def with_a_branch(w, xs):
    step = lambda c, x: (lax.cond(c.sum() > 0, lambda: jnp.tanh(c @ w) + x, lambda: jnp.sin(c) + x), None)
    return jnp.sum(lax.scan(step, C, xs)[0])


@scan
def unused_outputs(w, xs):
    return jnp.sum(lax.scan(tanh(w), C, xs)[0])


@scan
def unused_carry(w, xs):
    return jnp.sum(lax.scan(tanh(w), C, xs)[1])


@scan
def unrolled(w, xs):
    return jnp.sum(lax.scan(tanh(w), C, xs, unroll=3)[0])


@scan
def stopped(w, xs):
    """No cotangent reaches `w`."""
    return jnp.sum(lax.scan(lambda c, x: (lax.stop_gradient(jnp.tanh(c @ w)) + x * c, None), C, xs)[0])


@jax.custom_vjp
def peculiar(x):
    return jnp.sin(x)


peculiar.defvjp(lambda x: (jnp.sin(x), x), lambda x, _: (jnp.cos(x),))


@scan
def gradients_without_cotangents(w, xs):
    return jnp.sum(lax.scan(lambda c, x: (peculiar(x) + x + peculiar(c @ w), None), C, xs)[0])


@scan
def keys_as_slices(w, xs):
    step = lambda c, k: (jnp.tanh(c @ w) * jax.random.bernoulli(k, 0.8, c.shape).astype(c.dtype), None)
    return jnp.sum(lax.scan(step, C + xs[0], jax.random.split(jax.random.key(3), 12))[0])


@scan
def raw_keys_as_carry(w, xs):
    def step(carry, _):
        k, h = carry
        k, now = jax.random.split(k)
        return (k, jnp.tanh(h @ w) * jax.random.bernoulli(now, 0.8, h.shape).astype(h.dtype)), None

    return jnp.sum(lax.scan(step, (jax.random.PRNGKey(3), C + xs[0]), None, length=12)[0][1])


@scan
def half(w, xs):
    w, c, xs = (v.astype(jnp.float16) for v in (w, C, xs))
    return jnp.sum(lax.scan(tanh(w), c, xs)[0]).astype(jnp.float32)


@scan
def complex_numbers(w, xs):
    z = lax.complex(xs, 0.5 * xs)
    step = lambda c, z: (0.5 * jnp.tanh(c @ w.astype(jnp.complex64)) + z, None)
    return jnp.sum(jnp.abs(lax.scan(step, lax.complex(C, C), z)[0]))


@scan
def custom_rules(w, xs):
    return jnp.sum(lax.scan(lambda c, x: (sevenfold(c @ w) + threefold(x), None), C, xs)[0])


@jax.custom_vjp
def tabled(x):
    return jnp.sin(x)


TABLE = normal(5)
tabled.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x) * TABLE,))


@scan
def constants(w, xs):
    step = jax.jit(lambda c, x: (tabled(jnp.tanh(c @ w)) * TABLE + x, None))
    return jnp.sum(lax.scan(step, C, xs)[0])


@scan
def checkpointed(w, xs):
    step = jax.checkpoint(lambda c, x: (jnp.tanh(jnp.tanh(c @ w) @ w) + x, None))
    return jnp.sum(lax.scan(step, C, xs)[0])


@scan
def forwarded(w, xs):
    (a, _), (ys, ws) = lax.scan(lambda c, x: ((c[1], jnp.tanh(c[0] @ w) + x), (x, w)), (C, 2 * C), xs)
    return jnp.sum(a) + jnp.sum(ys) + jnp.sum(ws)


@scan
def indexed(w, xs):
    return jnp.sum(lax.scan(lambda c, i: (jnp.tanh(c @ w) + xs[i], None), C, jnp.arange(12))[0])


@scan
def weak_scalars(w, xs):
    a = lax.scan(lambda c, _: (c * 1.1, None), 1.0, None, length=12)[0]
    return jnp.sum(xs) * a * lax.scan(lambda c, _: (jnp.sin(c), None), w[0, 0], None, length=8)[0]


@scan
def two(w, xs):
    ys = lax.scan(lambda c, x: (jnp.tanh(c @ w) + x, c), C, xs)[1]
    return jnp.sum(lax.scan(lambda c, x: (jnp.tanh(c @ w.T) + x, None), C, jnp.sin(ys))[0])


def assert_all_options(f, most):
    """Up to `most` options of the scans of `f`, the others of the program recomputed."""
    want = jax.jit(jax.value_and_grad(f, (0, 1)))(W, XS)
    planner, values = planner_of(f, (W, XS), argnums=(0, 1))
    options = [s.policies for s in planner.scans.values()]
    longest = max(map(len, options), default=1)
    for k in sorted({round(k) for k in np.linspace(0, longest - 1, most)}):
        traced = planner.trace(Config(tuple(o[min(k, len(o) - 1)] for o in options), Loops()))
        candidate = planner._compiled(Proposal(traced, policy.Policy(saved_set.pinned(traced.joint)), 0.0, 0))
        assert_close_values(planner.run(candidate, values), want)


SAMPLE = (
    "prime_and_reverse",
    "integers",
    "nested",
    "in_a_branch",
    "one_step",
    "without_carry",
    "unused_outputs",
    "gradients_without_cotangents",
    "constants",
    "checkpointed",
    "forwarded",
    "stopped",
    "keys_as_slices",
    "weak_scalars",
)


@pytest.mark.parametrize("name", sampled(SCANS, SAMPLE))
def test_options(name):
    assert_all_options(SCANS[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANS)
def test_all_options(name):
    assert_all_options(SCANS[name], 20)


def in_segments(f, args, lengths, saved, is_staged=True):
    """The value and gradients of `f`, whose only scan keeps these nodes, None for all, in segments of these lengths."""
    planner, _ = planner_of(f, args, argnums=(0, 1))
    (only,) = planner.scans.values()
    choice = policy.Policy(saved_set.everything(only.joint) if saved is None else saved, is_staged=is_staged)
    candidate = planner._compiled(
        Proposal(planner.trace(Config((ScanPolicy(choice, lengths, 0, 0),), Loops())), None, 0.0, 0)
    )
    return lambda *values: planner.run(candidate, values)


@pytest.mark.parametrize(
    "case", sampled(itertools.product([(2,), (4, 3), (6, 4), (10, 3)], [False, True]), ["((4, 3), True)"])
)
def test_segments_of_any_length(case):
    """Also such that steps are left over, of all and of a segment."""
    lengths, reverse = case

    def f(w, xs):
        c, ys = lax.scan(lambda c, x: (jnp.tanh(c @ w) + x, c * x), C, xs[:11], reverse=reverse)
        return jnp.sum(c) + jnp.sum(ys * jnp.arange(11.0)[:, None, None])

    want = jax.jit(jax.value_and_grad(f, (0, 1)))(W, XS)
    for saved, is_staged in ((None, True), (frozenset(), True), (frozenset(), False)):
        assert_close_values(in_segments(f, (W, XS), lengths, saved, is_staged)(W, XS), want)


def eleven(w, xs):
    c, ys = lax.scan(lambda c, x: (jnp.tanh(jnp.tanh(c @ w) @ w) + x, c * x), xs[0], xs[:11])
    return jnp.sum(c) + jnp.sum(ys)


def test_second_derivatives_where_steps_are_left_over():
    once = in_segments(eleven, (W, XS), (3,), frozenset())
    of = lambda gradients: lambda w: jnp.sum(jnp.sin(gradients(w, XS)[1][0]))
    want = jax.jit(jax.grad(of(jax.value_and_grad(eleven, (0, 1)))))(W)
    np.testing.assert_allclose(jax.jit(jax.grad(of(once)))(W), want, rtol=1e-4, atol=1e-4)


def test_explicit_shardings_where_steps_are_left_over():
    mesh = jax.make_mesh((3,), ("i",), (jax.sharding.AxisType.Explicit,), devices=jax.devices("cpu")[:3])
    with jax.set_mesh(mesh):
        xs = jax.device_put(XS, NamedSharding(mesh, P(None, "i")))
        w = jax.device_put(W, NamedSharding(mesh, P()))
        got = in_segments(eleven, (w, xs), (3,), frozenset())(w, xs)
        want = jax.jit(jax.value_and_grad(eleven, (0, 1)))(w, xs)
    assert_close_values(got, want)
    assert got[1][1].sharding == want[1][1].sharding


def test_a_prime_number_of_steps_needs_as_little_as_another():
    smallest = {}
    for steps in (199, 200):
        f = lambda w, xs: jnp.sum(lax.scan(lambda c, x: (jnp.tanh(jnp.tanh(c @ w) @ w) + x, None), xs[0], xs)[0])
        with pytest.raises(fg.BudgetError) as error:
            fg.plan(f, jnp.ones((64, 64)) / 64, jnp.ones((steps, 32, 64)), memory=1)
        smallest[steps] = error.value.smallest
    assert smallest[199] < 1.1 * smallest[200]


def test_scans_have_options():
    """So that the tests above test something."""
    without = {name for name, f in SCANS.items() if not planner_of(f, (W, XS), argnums=(0, 1))[0].scans}
    assert without == {"one_step", "in_a_branch"}


# ------------------------------------------------------------------------------------------------ any choice at all


def assert_any_choice(f, args, options_of_grad, rounds=4):
    """Whatever is kept and held, the values are right: the search cannot make them wrong."""
    draw = random.Random(0)
    want = jax.jit(fg.value_and_grad(f, **options_of_grad))(*args)
    planner, values = planner_of(f, args, **options_of_grad)
    scans = [s.policies for s in planner.scans.values()]
    for k in range(rounds):
        chosen = tuple(draw.choice(o) for o in scans)
        traced = planner.trace(Config(chosen if k else (), Loops(*draw.choice([(1, 1), (4, 2), (32, 16)]))))
        nodes = range(len(traced.joint.nodes))
        saved = {v for v in nodes if draw.random() < (0, 0.5, 0.9, 0.2)[k]} | saved_set.pinned(traced.joint)
        held = frozenset(v for v in nodes if draw.random() < 0.5) if k % 2 else None
        choice = policy.Policy(frozenset(saved), held, is_staged=draw.random() < 0.7)
        candidate = planner._compiled(Proposal(traced, choice, 0.0, 0))
        got = planner.run(candidate, values)
        shapes = lambda tree: jax.tree.map(lambda x: x.shape if x.dtype == jax.dtypes.float0 else x, tree)
        assert_close_values(shapes(got), shapes(want))


MIXED = "mixed_bfloat16"  # how XLA rounds between bfloat16 and float32 depends on what it fuses
DIFFERENTIABLE = [p for p in CORPUS if p.diff is not None and ("grad" not in p.lacks or p.lacks == REVERSE)]
FEW = ("custom_vjp_in_loops", "references_in_loops", "while_in_scan")


@pytest.mark.parametrize("p", sampled([p for p in DIFFERENTIABLE if p.name != MIXED], FEW))
def test_any_choice(p):
    assert_any_choice(summed(p.f), p.args, options(p), 2 if p.name in FEW else 4)


SMALL = dict(
    mlp=dict(depth=6, width=16, batch=32),
    transformer=dict(depth=2, width=16, heads=2, time=8, batch=2, characters=11),
    resnet=dict(depth=2, channels=4, size=8, batch=2),
    lstm=dict(time=12, width=8, batch=3),
    gpt=dict(depth=4, width=16, heads=2, time=8, batch=2, characters=11),
    unet=dict(levels=2, channels=4, size=8, batch=2),
)
MODELS = {t.name.split()[0]: t for t in trainings(**SMALL) if t.name.endswith("forward")}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_any_choice_for_models(model):
    draw = np.random.default_rng(0)
    fill = lambda a: jnp.asarray(
        draw.standard_normal(a.shape) / 4 if a.dtype == jnp.float32 else draw.integers(0, 10, a.shape)
    )
    args = jax.tree.map(lambda a: fill(a).astype(a.dtype), MODELS[model].args)
    assert_any_choice(MODELS[model].f, args, {})


# ------------------------------------------------------------------------------------------------ what is predicted


def test_results_that_only_the_forward_pass_reads_are_not_counted_as_kept():
    def f(w, xs):
        hs = lax.scan(lambda c, x: (jnp.tanh(c @ w) + x, c), xs[0], xs)[1]
        return jnp.sum(hs[-1] ** 2)

    types = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((200, 64, 64), jnp.float32)
    plan = fg.plan(f, *types, memory="60%")
    assert plan.predicted_bytes <= 1.1 * plan.compiled_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on other devices memory is not new at each call")
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA of JAX 0.10 drops barriers outside of loops")
def test_what_takes_longer_to_have_memory_for_than_to_compute_again_is_not_kept():
    """Of temporaries beyond 32 MiB only: smaller ones are kept from call to call."""

    def f(w, x):
        for k in range(12):
            x = jnp.sin(jnp.sin(x) * w[k])
        return jnp.sum(x)

    parts = {}
    for n in (2**20, 2**14):
        types = jax.ShapeDtypeStruct((12,), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)
        plan = fg.plan(f, *types, memory="95%")
        parts[n] = plan.compiled_bytes / plan.default_bytes
    assert parts[2**20] < 0.6 < 0.7 < parts[2**14]
