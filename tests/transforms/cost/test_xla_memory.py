"""The temporaries that XLA is predicted to need, against what it says after it has compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from funcgrad.transforms.cost.backends import BACKENDS
from funcgrad.transforms.cost.library_calls import copied_bytes
from jax import lax

import funcgrad as fg

from ...checks import temp_bytes
from ...sampling import sampled
from ...trainings import trainings

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="measured on CPUs alone")
OLD = jax.__version_info__ < (0, 11)
# Of JAX 0.10, whose XLA loses barriers: 50 and 53 % too many in the two of the MLP, 33 % in the U-Net.
MISSED_BY_OLD = {"mlp remat", "mlp products", "unet forward"}
FEW = ("mlp gradient", "transformer forward", "resnet products", "lstm remat")
PROGRAMS = {t.name: t for t in trainings()}

W, X = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((256, 64), jnp.float32)
ARRAY = 256 * 64 * 4


def deviation(name):
    t = PROGRAMS[name]
    return abs(fg.cost(t.f, *t.args).temp_bytes / temp_bytes(t.f, *t.args) - 1)


@pytest.mark.parametrize("name", sampled(FEW, ["mlp gradient", "lstm remat"]))
def test_a_few(name):
    assert deviation(name) <= 0.15


@pytest.mark.slow
def test_all():
    """Nine of ten within 15 %, none beyond 40 %; of JAX 0.10, of those that are not known to be missed."""
    names = set(PROGRAMS) - (MISSED_BY_OLD if OLD else set())
    deviations = {name: deviation(name) for name in names}
    assert len(PROGRAMS) == 24
    assert sum(d <= 0.15 for d in deviations.values()) >= 0.9 * len(deviations)
    assert max(deviations.values()) <= 0.4


# ------------------------------------------------------------------------------------------------ the rules, one by one


@pytest.mark.parametrize(
    ("f", "arrays"),
    [
        (lambda w, x: x * 2 + jnp.sin(x), 0),  # one kernel, which writes the result
        (lambda w, x: (x @ w) @ w, 1),
        (lambda w, x: jnp.tanh(x @ w) @ w, 1),  # tanh in place
        (lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w), 0),  # drawn in by the sum
        (lambda w, x: jnp.sort((x @ w) + x, axis=0), 0),  # in place
        (lambda w, x: lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, None, length=5)[0], 1),
    ],
)
def test_small_programs(f, arrays):
    predicted = fg.cost(f, W, X).temp_bytes
    assert predicted == pytest.approx(arrays * ARRAY, abs=256)
    assert predicted == pytest.approx(temp_bytes(f, W, X), abs=4096)


def residual(w, x):
    for _ in range(6):
        x = jnp.sin(x @ w) + x
    return jnp.mean(x**2)


def test_sums_that_are_read_here_and_behind_a_product_are_kept():
    """XLA reads no more arrays than it must: a sum has memory rather than all that it is the sum of."""

    def f(w, x):
        for _ in range(6):
            x = (jnp.cos(x) @ w) + x
        return jnp.cos(x)

    for program in (f, jax.grad(residual)):
        assert fg.cost(program, W, X).temp_bytes == pytest.approx(temp_bytes(program, W, X), rel=0.1)


def test_what_is_computed_again_is_not_kept():
    def loss(wrap):
        layer = wrap(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))
        return jax.grad(lambda w, x: jnp.sum(layer(w, layer(w, layer(w, x))) ** 2))

    remat, kept = (fg.cost(loss(wrap), W, X).temp_bytes for wrap in (jax.checkpoint, lambda f: f))
    assert remat < kept or OLD


def test_a_number_is_the_same_however_it_is_written():
    """JAX holds 2.0 as a number of Python or as one of an array's type."""

    def f(make):
        return lambda x: jnp.sum(x * make()) + jnp.sum(jnp.exp(x * jnp.full(x.shape, 2.0)))

    x = jnp.ones((1000,))
    typed, python = (
        fg.cost(f(make), x).temp_bytes for make in (lambda: lax.full_like(x, 2.0), lambda: jnp.full(x.shape, 2.0))
    )
    assert typed == python


def test_the_prediction_is_in_the_dict():
    cost = fg.cost(lambda w, x: (x @ w) @ w, W, X)
    assert cost.dict()["temp_bytes"] == cost.temp_bytes


@pytest.mark.parametrize("f", [lambda x: jnp.sin(x) * x, lambda x: x * 2 + 1])
def test_a_long_chain_of_one_kernel_needs_no_temporaries(f):
    def program(x):
        for _ in range(500):
            x = f(x)
        return x

    assert fg.cost(program, jnp.ones((4, 8))).temp_bytes == 0


def test_copies_of_operands_in_another_order():
    def copied(axis):
        product = lambda x, y: lax.dot_general(x, y, (((axis,), (1,)), ((0,), (0,))))
        x, y = jax.ShapeDtypeStruct((8, 16, 4, 16), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
        return sum(copied_bytes(eqn, BACKENDS["cpu"]) for eqn in fg.trace(product, x, y).eqns)

    assert copied(3) == 0
    assert copied(1) == 8 * 16 * 4 * 16 * 4
