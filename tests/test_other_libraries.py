"""Programs of other libraries as they are: traced, rewritten, differentiated, batched, trained, and equal to JAX's own.

`MODELS` is the table: each entry makes `(f, params, state, batch)`, where `f(params, state, batch)` returns a scalar loss and
what else the model computes, such as its new batch statistics. Those of libraries in the extra `test-slow` are marked slow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import jaxpr_as_fun

import funcgrad as fg

from .checks import (
    assert_same_graph,
    assert_same_program,
    assert_same_values,
    identity_live,
    identity_rewrite,
)

pytestmark = pytest.mark.standard_promotion
X = jnp.linspace(-1, 1, 24).reshape(4, 6)
Y = jnp.linspace(1, -1, 12).reshape(4, 3)
IMAGES = jnp.sin(jnp.arange(2 * 8 * 8 * 3.0)).reshape(2, 8, 8, 3)
CLASSES = jnp.array([1, 3])
TOKENS = jnp.array([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])


def filled(shapes):
    """Some values for parameters and state: initialisers would have to be compiled."""
    count = itertools.count()

    def value(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(np.sin(next(count) + np.arange(x.size)).reshape(x.shape), x.dtype)

    return jax.tree.map(value, shapes)


def abstract(make: Callable) -> tuple:
    """The shapes of an equinox model's parameters, and the rest of it."""
    return eqx.partition(eqx.filter_eval_shape(make), lambda x: isinstance(x, jax.ShapeDtypeStruct))


def squared(apply: Callable) -> Callable:
    """The loss of a regression."""

    def f(params, state, batch):
        out = apply(params, batch[0])
        return jnp.mean((out - batch[1]) ** 2), out

    return f


def classified(apply: Callable) -> Callable:
    """The loss of a classifier whose `apply` gives logits and the new state."""

    def f(params, state, batch):
        logits, state = apply(params, state, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), state

    return f


# Dense networks


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.LayerNorm()(linen.Dense(8)(x)))
        return linen.Dense(3)(x)


def of_linen():
    model = Linen()
    return squared(model.apply), filled(jax.eval_shape(model.init, jax.random.key(0), X)), {}, (X, Y)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm, self.last = (
            nnx.Linear(6, 8, rngs=rngs),
            nnx.LayerNorm(8, rngs=rngs),
            nnx.Linear(8, 3, rngs=rngs),
        )

    def __call__(self, x):
        return self.last(nnx.tanh(self.norm(self.first(x))))


def of_nnx():
    definition, params = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
    return squared(lambda params, x: nnx.merge(definition, params)(x)), filled(params), {}, (X, Y)


def of_equinox():
    params, static = abstract(lambda: eqx.nn.MLP(6, 3, 8, 2, activation=jnp.tanh, key=jax.random.key(0)))
    return squared(lambda params, x: jax.vmap(eqx.combine(params, static))(x)), filled(params), {}, (X, Y)


# Residual networks: three stages, batch statistics as state


class LinenBlock(linen.Module):
    width: int
    stride: int

    @linen.compact
    def __call__(self, x):
        norm = functools.partial(linen.BatchNorm, use_running_average=False, momentum=0.9)
        y = linen.relu(norm()(linen.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)))
        y = norm(scale_init=linen.initializers.zeros)(linen.Conv(self.width, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(linen.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return linen.relu(x + y)


class LinenResNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(linen.Conv(4, (3, 3))(x), (2, 2), (2, 2))
        for width, stride in ((4, 1), (8, 2), (8, 2)):
            x = LinenBlock(width, stride)(x)
        return linen.Dense(5)(x.mean((1, 2)))


def of_linen_resnet():
    model = LinenResNet()
    state = filled(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    params = state.pop("params")
    apply = lambda params, state, x: model.apply({"params": params, **state}, x, mutable=["batch_stats"])
    return classified(apply), params, state, (IMAGES, CLASSES)


class NnxBlock(nnx.Module):
    def __init__(self, inputs, width, stride, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.first, self.second = conv(inputs, width, (3, 3), stride), conv(width, width, (3, 3))
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for _ in range(2)])
        self.project = conv(inputs, width, (1, 1), stride) if (inputs, stride) != (width, 1) else None

    def __call__(self, x):
        y = nnx.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return nnx.relu(y + (self.project(x) if self.project else x))


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.head = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(4, 4, 1, rngs), NnxBlock(4, 8, 2, rngs), NnxBlock(8, 8, 2, rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((1, 2))))


def of_nnx_resnet():
    definition, params, state = nnx.split(nnx.eval_shape(lambda: NnxResNet(nnx.Rngs(0))), nnx.Param, ...)

    def apply(params, state, x):
        model = nnx.merge(definition, params, state, copy=True)
        logits = model(x)  # which counts the statistics and the random keys on
        return logits, nnx.split(model, nnx.Param, ...)[2]

    return classified(apply), filled(params), filled(state), (IMAGES, CLASSES)


# A transformer


class Layer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    feed: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, use_output_bias=True, key=one)
        self.norms = [eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)]
        self.feed = eqx.nn.MLP(8, 8, 16, 1, jax.nn.gelu, key=two)
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, key):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + self.dropout(jax.vmap(lambda x: self.feed(self.norms[1](x)))(x), key=key)


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    positions: jax.Array
    layers: list[Layer]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.embedding, self.head = eqx.nn.Embedding(7, 8, key=keys[0]), eqx.nn.Linear(8, 7, key=keys[1])
        self.positions = 0.1 * jax.random.normal(keys[2], (5, 8))
        self.layers = [Layer(k) for k in keys[3:]]

    def __call__(self, tokens, key):
        x = jax.vmap(self.embedding)(tokens) + self.positions
        for layer, k in zip(self.layers, jax.random.split(key, len(self.layers)), strict=True):
            x = layer(x, k)
        return jax.vmap(self.head)(x)


def of_transformer():
    params, static = abstract(lambda: Transformer(jax.random.key(0)))

    def apply(params, key, tokens):
        model = eqx.combine(params, static)
        key, *keys = jax.random.split(key, 1 + len(tokens))
        return jax.vmap(model)(tokens, jnp.stack(keys)), key

    return classified(apply), filled(params), jax.random.key(1), (TOKENS, jnp.roll(TOKENS, -1, 1))


# Libraries of the extra `test-slow`


def of_haiku_lstm():
    hk = pytest.importorskip("haiku", exc_type=ImportError)

    def run(xs):
        lstm = hk.LSTM(4)
        hidden, _ = hk.dynamic_unroll(lstm, xs, lstm.initial_state(2))
        return hk.Linear(2)(hidden)

    model = hk.without_apply_rng(hk.transform(run))
    xs = jnp.sin(jnp.arange(36.0)).reshape(6, 2, 3)
    return squared(model.apply), filled(jax.eval_shape(model.init, jax.random.key(0), xs)), {}, (xs, xs[..., :2])


def of_diffrax():
    dfx = pytest.importorskip("diffrax", exc_type=ImportError)

    def apply(params, start):
        """Lotka and Volterra's hares and lynxes."""
        rates = lambda t, y, p: jnp.stack([p[0] * y[0] - p[1] * y[0] * y[1], p[2] * y[0] * y[1] - p[3] * y[1]])
        options = {"saveat": dfx.SaveAt(ts=jnp.linspace(0.0, 2.0, 5)), "max_steps": 64}
        control = dfx.PIDController(rtol=1e-4, atol=1e-4)
        return dfx.diffeqsolve(
            dfx.ODETerm(rates), dfx.Tsit5(), 0.0, 2.0, 0.1, start, params, stepsize_controller=control, **options
        ).ys

    return squared(apply), jnp.array([1.0, 0.5, 0.3, 0.9]), {}, (jnp.array([1.0, 2.0]), jnp.ones((5, 2)))


def of_numpyro():
    numpyro = pytest.importorskip("numpyro", exc_type=ImportError)
    from numpyro import distributions as dist
    from numpyro.infer.util import log_density

    def schools(errors, effects=None):
        mean, scale = numpyro.sample("mean", dist.Normal(0, 5)), numpyro.sample("scale", dist.HalfCauchy(5))
        with numpyro.plate("school", len(errors)):
            each = numpyro.sample("each", dist.Normal(mean, scale))
            numpyro.sample("effects", dist.StudentT(4.0, each, errors), obs=effects)

    def f(params, state, batch):
        density, trace = log_density(schools, batch, {}, params)
        return -density, {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}

    params = {"mean": jnp.float32(0.5), "scale": jnp.float32(1.5), "each": jnp.linspace(-1, 1, 4)}
    return f, params, {}, (jnp.array([15.0, 10.0, 16.0, 11.0]), jnp.array([28.0, 8.0, -3.0, 7.0]))


DENSE = {"linen": of_linen, "nnx": of_nnx, "equinox": of_equinox}
MODELS = DENSE | {"linen_resnet": of_linen_resnet, "nnx_resnet": of_nnx_resnet, "transformer": of_transformer}
SLOW = {"haiku_lstm": of_haiku_lstm, "diffrax": of_diffrax, "numpyro": of_numpyro}


# Traced, rewritten, differentiated, batched

every = pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
FORMS = {
    "function": lambda f, args: f,
    "graph": lambda f, args: fg.trace(f, *args),
    "rewritten": lambda f, args: identity_rewrite(fg.trace(f, *args)),
    "live": lambda f, args: identity_live(f),
}
AXES = (None, None, 0)


@functools.cache
def program(name: str) -> tuple[Callable, tuple]:
    f, *args = (MODELS | SLOW)[name]()
    return f, tuple(args)


@every
def test_traced_and_rewritten(name):
    f, args = program(name)
    graph = fg.verify(fg.trace(f, *args))
    assert graph.out_tree == jax.tree.structure(jax.eval_shape(f, *args))
    again = fg.verify(identity_rewrite(graph))
    if name == "diffrax":  # constants of its inner functions have become operands, once
        graph, again = again, identity_rewrite(again)
    assert_same_graph(again, graph)
    assert_same_program(again, f, args)
    assert_same_program(identity_live(f), f, args)


@pytest.mark.sample(1 / 3, ("name", "form"))
@every
@pytest.mark.parametrize("form", FORMS)
def test_differentiated(name, form):
    f, args = program(name)
    is_graph = form in ("graph", "rewritten")
    assert_same_program(fg.grad(FORMS[form](f, args), has_aux=True), jax.grad(f, has_aux=True), args, is_graph)


@pytest.mark.sample(1 / 3, ("form",))
@every
@pytest.mark.parametrize("form", ["function", "graph"])
def test_batched(name, form):
    f, args = program(name)
    stacked = (*args[:2], jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), args[2]))
    got = fg.vmap(fg.grad(FORMS[form](f, args), has_aux=True), AXES, axis_size=2)
    assert_same_program(got, jax.vmap(jax.grad(f, has_aux=True), AXES), stacked, is_graph=form == "graph")


@pytest.mark.sample(1 / 3)
@pytest.mark.parametrize("name", DENSE)
def test_a_rule_reaches_inside(name):
    f, args = program(name)
    rules = {lax.tanh_p: lambda eqn, x: lax.tanh(x) * 0}
    dead, _ = fg.grad(f, has_aux=True, rules=rules)(*args)
    alive, _ = fg.grad(f, has_aux=True)(*args)
    zeros = lambda tree: sum(int(not np.any(leaf)) for leaf in jax.tree.leaves(tree))
    assert zeros(dead) > zeros(alive)


@pytest.mark.sample(1 / 3)
@pytest.mark.parametrize("name", DENSE)
def test_trained(name):
    f, (params, state, batch) = program(name)
    update = fg.step(lambda params, batch: f(params, state, batch)[0], optax.adam(3e-2))
    trained, log = fg.train(update, update.init(params), [batch] * 60, steps=60, progress=False)
    assert log.metrics["loss"][-1] < 0.1 * log.metrics["loss"][0]
    assert jax.tree.map(jnp.shape, trained.params) == jax.tree.map(jnp.shape, params)


# Optimizers

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adafactor": optax.adafactor,
    "lion": optax.lion,
    "novograd": optax.novograd,
    "chained": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(rate, 3), weight_decay=0.1)
    ),
    "every_second": lambda rate: optax.MultiSteps(optax.rmsprop(rate), 2),
}


@pytest.mark.sample(1 / 3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unrolled_optimizer_is_differentiated(name):
    """The gradient of a loss after three steps, with respect to the parameters before them."""
    optimizer = OPTIMIZERS[name](0.1)
    loss = lambda w: jnp.sum((w - jnp.arange(3.0)) ** 2)

    def unrolled(m, w):
        state = optimizer.init(w)
        for _ in range(3):
            updates, state = optimizer.update(m.grad(loss)(w), state, w)
            w = optax.apply_updates(w, updates)
        return loss(w)

    w = jnp.ones(3)
    want = jax.jit(jax.grad(lambda w: unrolled(jax, w)))(w)
    assert_same_values(jax.jit(fg.grad(lambda w: unrolled(fg, w)))(w), want)
    # A Graph adds up the cotangents in the order of JAX's function, or of JAX's jaxpr.
    got = jax.jit(fg.grad(fg.trace(lambda w: unrolled(fg, w), w)))(w)
    traced = jaxpr_as_fun(jax.make_jaxpr(lambda w: unrolled(jax, w))(w))
    as_jaxpr = jax.jit(jax.grad(lambda w: traced(w)[0]))(w)
    assert_same_values(got, want if np.array_equal(got, want) else as_jaxpr)


def test_variables_of_nnx_may_change_under_a_watching_trace():
    """flax asks which trace is current before it changes a variable; ours have no values of their own."""
    norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    run = lambda x: norm(x).sum()
    for watched in (
        fg.live(run, fg.Rules("none", {lax.tan_p: lambda eqn, x: x})),
        lambda x: fg.tap(run, where=fg.op("sub"))(x)[0],
        lambda x: fg.nan_origin(run, x.at[0, 0].set(jnp.nan)),
    ):
        before = norm.mean[...]
        watched(X)
        assert not np.array_equal(before, norm.mean[...])
    with pytest.raises(Exception, match="Cannot mutate"):
        fg.grad(run)(X)
    assert norm.mean[...].shape == (6,)
