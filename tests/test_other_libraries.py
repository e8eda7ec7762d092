"""Models of flax and equinox, and optimizers of optax, as they are: traced, rewritten, differentiated, trained."""

from __future__ import annotations

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import funcgrad as fg

pytestmark = pytest.mark.standard_promotion
X = jnp.linspace(-1, 1, 24).reshape(4, 6)
Y = jnp.linspace(1, -1, 12).reshape(4, 3)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.LayerNorm()(linen.Dense(8)(x)))
        return linen.Dense(3)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm, self.last = (
            nnx.Linear(6, 8, rngs=rngs),
            nnx.LayerNorm(8, rngs=rngs),
            nnx.Linear(8, 3, rngs=rngs),
        )

    def __call__(self, x):
        return self.last(nnx.tanh(self.norm(self.first(x))))


def of_linen():
    model = Linen()
    return model.init(jax.random.key(0), X), model.apply


def of_nnx():
    definition, params = nnx.split(Nnx(nnx.Rngs(0)))
    return params, lambda params, x: nnx.merge(definition, params)(x)


def of_equinox():
    model = eqx.nn.MLP(6, 3, 8, 2, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


MODELS = {"linen": of_linen, "nnx": of_nnx, "equinox": of_equinox}


@pytest.fixture(params=MODELS)
def model(request):
    params, apply = MODELS[request.param]()
    return params, lambda params, batch: jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_traced_rewritten_differentiated_batched(model):
    params, loss = model
    graph = fg.verify(fg.trace(loss, params, (X, Y)))
    assert any(eqn.primitive.name == "tanh" for _, eqn in fg.walk(graph))
    assert_equal(jax.jit(graph)(params, (X, Y)), jax.jit(loss)(params, (X, Y)))
    assert_equal(jax.jit(fg.grad(loss))(params, (X, Y)), jax.jit(jax.grad(loss))(params, (X, Y)))
    assert_equal(jax.jit(fg.grad(graph))(params, (X, Y)), jax.jit(jax.grad(loss))(params, (X, Y)))
    axes = (None, 0)
    stacked = (jnp.stack([X, 2 * X]), jnp.stack([Y, 3 * Y]))
    got = jax.jit(fg.vmap(fg.grad(graph), axes, axis_size=2))(params, stacked)
    assert_equal(got, jax.jit(jax.vmap(jax.grad(loss), axes))(params, stacked))


def test_a_rule_reaches_inside(model):
    params, loss = model
    rules = {lax.tanh_p: lambda eqn, x: lax.tanh(x) * 0}
    dead = fg.grad(loss, rules=rules)(params, (X, Y))
    live = fg.grad(loss)(params, (X, Y))
    zeros = lambda tree: sum(int(not np.any(leaf)) for leaf in jax.tree.leaves(tree))
    assert zeros(dead) > zeros(live)


def test_trained(model):
    params, loss = model
    update = fg.step(loss, optax.adam(3e-2))
    state, log = fg.train(update, update.init(params), [(X, Y)] * 60, steps=60, progress=False)
    assert log.metrics["loss"][-1] < 0.1 * log.metrics["loss"][0]
    assert_equal(jax.tree.map(jnp.shape, state.params), jax.tree.map(jnp.shape, params))


@pytest.mark.parametrize("make", [optax.sgd, optax.adam, optax.adafactor, optax.lion, optax.novograd])
def test_an_unrolled_optimizer_is_differentiated(make):
    """The gradient of a loss after three steps, with respect to the parameters before them."""
    optimizer = make(0.1)
    loss = lambda w: jnp.sum((w - jnp.arange(3.0)) ** 2)

    def unrolled(m, w):
        state = optimizer.init(w)
        for _ in range(3):
            updates, state = optimizer.update(m.grad(loss)(w), state, w)
            w = optax.apply_updates(w, updates)
        return loss(w)

    w = jnp.ones(3)
    want = jax.jit(jax.grad(lambda w: unrolled(jax, w)))(w)
    assert_equal(jax.jit(fg.grad(lambda w: unrolled(fg, w)))(w), want)
    assert_equal(jax.jit(fg.grad(fg.trace(lambda w: unrolled(fg, w), w)))(w), want)
