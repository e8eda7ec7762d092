"""Layers against flax, equinox and NumPy with the same weights, and the laws that hold among layers."""

import functools
import re
import subprocess
import sys
import traceback

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core.errors import ArgumentError, OptionError
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from funcgrad import nn

from ...sampling import sampled

KEY = jax.random.key(7)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def drawn(layer, x):
    """Params as `layer.init` would make them, but drawn: no bias of 0, no scale of 1."""
    params, _ = jax.eval_shape(layer.init, KEY, x)
    return jax.tree.map(lambda p: 0.5 * draw(*p.shape, seed=sum(p.shape)), params)


def close(actual, expected, tolerance=2e-5):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, tolerance, tolerance), actual, expected)


def flax(module, **names):
    """`reference(params, x)` of a flax module whose params are ours under other names."""
    return lambda params, x: module.apply({"params": {theirs: params[ours] for theirs, ours in names.items()}}, x)


def flax_attention(heads, causal):
    def reference(params, x):
        m = x.shape[-1]
        cut = (heads, m // heads)
        qkv, out = params["qkv"], params["out"]
        theirs = {
            name: {"kernel": w.reshape(m, *cut), "bias": b.reshape(cut)}
            for name, w, b in zip(
                ("query", "key", "value"), jnp.split(qkv["w"], 3, -1), jnp.split(qkv["b"], 3), strict=True
            )
        }
        theirs["out"] = {"kernel": out["w"].reshape(*cut, m), "bias": out["b"]}
        mask = linen.make_causal_mask(x[..., 0]) if causal else None
        return linen.MultiHeadDotProductAttention(heads).apply({"params": theirs}, x, mask=mask)

    return reference


def equinox_cell(make, **names):
    """`reference(params, x)` of an equinox cell, stepped by a Python loop; x is [batch, time, features]."""

    def reference(params, x):
        features = params["w_h"].shape[0]
        cell = make(x.shape[-1], features, key=KEY)
        values = {"weight_ih": params["w_x"].T, "weight_hh": params["w_h"].T}
        values |= {theirs: params[ours] for theirs, ours in names.items()}
        cell = eqx.tree_at(lambda c: [getattr(c, name) for name in values], cell, list(values.values()))

        def run(x):
            zeros = jnp.zeros(features)
            carry, outputs = (zeros, zeros) if isinstance(cell, eqx.nn.LSTMCell) else zeros, []
            for step in x:
                carry = cell(step, carry)
                outputs.append(carry[0] if isinstance(carry, tuple) else carry)
            return jnp.stack(outputs)

        return jax.vmap(run)(x)

    return reference


def elman(params, x):
    h, outputs = jnp.zeros((len(x), params["w_h"].shape[0])), []
    for t in range(x.shape[1]):
        h = jnp.tanh(x[:, t] @ params["w_x"] + h @ params["w_h"] + params["b"])
        outputs.append(h)
    return jnp.stack(outputs, 1)


def flax_conv(features, window, groups=1, **options):
    return flax(linen.Conv(features, window, feature_group_count=groups, **options), kernel="w", bias="b")


def flax_pool(pool, window, **options):
    return lambda params, x: pool(x, window, **options)


WITHOUT_PADDING = {"count_include_pad": False}
# name: layer, x, reference(params, x)
LAYERS = {
    "dense": (nn.dense(5), (2, 3, 4), flax(linen.Dense(5), kernel="w", bias="b")),
    "dense without bias": (nn.dense(5, b=None), (4,), flax(linen.Dense(5, use_bias=False), kernel="w")),
    "conv 1D": (nn.conv(3, (4,)), (2, 7, 2), flax_conv(3, (4,))),
    "conv 2D": (nn.conv(3, (3, 2)), (2, 5, 4, 2), flax_conv(3, (3, 2))),
    "conv 3D": (nn.conv(2, (2, 2, 3), padding="VALID"), (1, 3, 4, 4, 2), flax_conv(2, (2, 2, 3), padding="VALID")),
    "conv of stride": (nn.conv(3, (3, 3), stride=(2, 1)), (2, 6, 5, 1), flax_conv(3, (3, 3), strides=(2, 1))),
    "conv dilated": (
        nn.conv(3, (3,), dilation=2, padding=((2, 1),)),
        (2, 8, 2),
        flax_conv(3, (3,), kernel_dilation=2, padding=((2, 1),)),
    ),
    "conv of groups": (nn.conv(4, (3,), groups=2), (2, 5, 6), flax_conv(4, (3,), groups=2)),
    "conv on its own": (nn.conv(3, (3, 3)), (5, 4, 2), flax_conv(3, (3, 3))),
    "conv of two batch axes": (nn.conv(3, (2,)), (2, 3, 5, 2), flax_conv(3, (2,))),
    "max_pool": (nn.max_pool((2, 2)), (2, 4, 6, 3), flax_pool(linen.max_pool, (2, 2), strides=(2, 2))),
    "max_pool cropped": (nn.max_pool((2, 3)), (2, 5, 7, 3), flax_pool(linen.max_pool, (2, 3), strides=(2, 3))),
    "max_pool padded": (
        nn.max_pool((3,), padding="SAME"),
        (2, 7, 3),
        flax_pool(linen.max_pool, (3,), strides=(3,), padding="SAME"),
    ),
    "max_pool padded by hand": (
        nn.max_pool((2,), padding=((1, 2),)),
        (2, 6, 3),
        flax_pool(linen.max_pool, (2,), strides=(2,), padding=((1, 2),)),
    ),
    "max_pool overlapping": (
        nn.max_pool((3, 3), stride=2),
        (2, 7, 7, 2),
        flax_pool(linen.max_pool, (3, 3), strides=(2, 2)),
    ),
    "max_pool 3D": (nn.max_pool((2, 2, 2)), (1, 4, 2, 4, 1), flax_pool(linen.max_pool, (2, 2, 2), strides=(2, 2, 2))),
    "avg_pool": (nn.avg_pool((2, 2)), (2, 4, 6, 3), flax_pool(linen.avg_pool, (2, 2), strides=(2, 2))),
    "avg_pool padded": (
        nn.avg_pool((2, 3), padding="SAME"),
        (2, 5, 7, 3),
        flax_pool(linen.avg_pool, (2, 3), strides=(2, 3), padding="SAME", **WITHOUT_PADDING),
    ),
    "avg_pool overlapping": (
        nn.avg_pool((3,), stride=1, padding="SAME"),
        (2, 5, 3),
        flax_pool(linen.avg_pool, (3,), strides=(1,), padding="SAME", **WITHOUT_PADDING),
    ),
    "layer_norm": (nn.layer_norm(), (2, 3, 4), flax(linen.LayerNorm(epsilon=1e-5), scale="scale", bias="bias")),
    "rms_norm": (nn.rms_norm(), (2, 3, 4), flax(linen.RMSNorm(epsilon=1e-5), scale="scale")),
    "group_norm": (nn.group_norm(2), (2, 3, 5, 4), flax(linen.GroupNorm(2, epsilon=1e-5), scale="scale", bias="bias")),
    "group_norm of features": (
        nn.group_norm(2),
        (3, 6),
        flax(linen.GroupNorm(2, epsilon=1e-5), scale="scale", bias="bias"),
    ),
    "attention": (nn.attention(2), (2, 5, 8), flax_attention(2, causal=False)),
    "attention causal": (nn.attention(4, causal=True), (2, 5, 8), flax_attention(4, causal=True)),
    "rnn": (nn.rnn(4), (2, 5, 3), elman),
    "lstm": (nn.lstm(4), (2, 5, 3), equinox_cell(eqx.nn.LSTMCell, bias="b")),
    "gru": (nn.gru(4), (2, 5, 3), equinox_cell(eqx.nn.GRUCell, bias="b", bias_n="b_n")),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.standard_promotion
@each_layer
def test_values_and_derivatives_are_those_of_the_reference(name):
    layer, shape, reference = LAYERS[name]
    x = draw(*shape)
    params = drawn(layer, x)
    dx, dy = draw(*shape, seed=1), draw(*jax.eval_shape(layer, params, x).shape, seed=2)

    def derivatives(f):
        y, pull = jax.vjp(f, params, x)
        return y, pull(dy), jax.jvp(lambda x: f(params, x), (x,), (dx,))[1]

    close(*jax.jit(lambda: (derivatives(layer), derivatives(reference)))(), 1e-4)


SAMPLE = "dense", "conv 2D", "avg_pool padded", "max_pool", "layer_norm", "group_norm", "attention causal", "gru"


@pytest.mark.parametrize("name", sampled(LAYERS, SAMPLE))
def test_vmap_and_bfloat16(name):
    layer, shape, _ = LAYERS[name]
    x = draw(*shape)
    params = drawn(layer, x)
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    low, _ = jax.eval_shape(layer.init, KEY, half(x))
    assert low == jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)

    y, mapped, rough = jax.jit(
        lambda: (layer(params, x), jax.vmap(layer, (None, 0))(params, x[None]), layer(half(params), half(x)))
    )()
    close(mapped[0], y)
    assert rough.dtype == jnp.bfloat16
    close(rough.astype(jnp.float32), y, 0.1)


@each_layer
def test_init_of_a_shape_is_that_of_an_array(name):
    layer, shape, _ = LAYERS[name]
    params, state = jax.eval_shape(layer.init, KEY, draw(*shape))
    assert (params, state) == jax.eval_shape(lambda key: layer.init(key, jax.ShapeDtypeStruct(shape, jnp.float32)), KEY)
    assert state == {}


@each_layer
def test_runs_under_its_own_scope(name):
    layer, shape, _ = LAYERS[name]
    x = draw(*shape)
    stacks = scopes(jax.make_jaxpr(layer)(drawn(layer, x), x))
    assert stacks
    assert all(stack.split("/")[0] == layer.name for stack in stacks)


def scopes(jaxpr):
    return {str(eqn.source_info.name_stack) for eqn in jaxpr.eqns}


@pytest.mark.parametrize("name", ["dense", "layer_norm", "lstm", "attention"])
def test_float64(name):
    with jax.enable_x64(True):
        layer, shape, _ = LAYERS[name]
        x = jax.ShapeDtypeStruct(shape, jnp.float64)
        params, _ = jax.eval_shape(layer.init, KEY, x)
        assert jax.eval_shape(layer, params, x).dtype == jnp.float64


def test_params_for_integers_are_float32():
    params, _ = nn.dense(3).init(KEY, jnp.ones((2, 4), jnp.uint8))
    assert params["w"].dtype == jnp.float32


def test_numpy_inputs():
    x = np.ones((2, 4))  # float64, which JAX takes as float32
    params, _ = nn.dense(3).init(KEY, x)
    assert params["w"].dtype == jnp.float32


# Embedding


def test_embedding_reads_rows():
    layer, ids = nn.embedding(5, 3), jnp.array([[4, 0], [1, 1]])
    params, _ = layer.init(KEY, ids)
    np.testing.assert_array_equal(layer(params, ids), np.asarray(params["w"])[np.asarray(ids)])
    counts = jax.grad(lambda p: layer(p, ids).sum())(params)["w"]
    np.testing.assert_array_equal(counts, np.broadcast_to([[1], [2], [0], [0], [1]], (5, 3)))


def test_embedding_dtype_and_rows_that_do_not_exist():
    layer = nn.embedding(5, 3, dtype=jnp.bfloat16)
    params, _ = layer.init(KEY, jnp.array([5]))
    assert params["w"].dtype == jnp.bfloat16
    assert jnp.isnan(layer(params, jnp.array([5]))).all()


# Convolution and pooling


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the gradient is JAX's own")
def test_gradient_of_conv_is_written_in_canonical_order():
    """Other orders are many times slower in a scan on CPUs."""
    layer, x = nn.conv(3, (3, 3)), draw(2, 5, 4, 2)
    params = drawn(layer, x)
    _, pull = jax.vjp(layer, params, x)
    eqns = jax.make_jaxpr(pull)(draw(2, 5, 4, 3)).eqns
    orders = [eqn.params["dimension_numbers"] for eqn in eqns if eqn.primitive is lax.conv_general_dilated_p]
    assert orders == [lax.conv_dimension_numbers(x.shape, x.shape, ("NHWC", "HWIO", "NHWC"))] * 2


def test_second_derivatives_of_conv():
    layer = nn.conv(2, (2,), stride=2, dilation=2, groups=2, padding="SAME")
    x, w = draw(2, 5, 4), draw(2, 2, 2, seed=1)

    def plain(w, x):
        return lax.conv_general_dilated(
            x, w, (2,), "SAME", rhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )

    second = lambda f: jax.hessian(lambda w, x: jnp.sum(jnp.tanh(f(w, x))), (0, 1))(w, x)
    ours = lambda w, x: layer({"w": w, "b": jnp.zeros(2)}, x)
    close(*jax.jit(lambda: (second(ours), second(plain)))(), 1e-4)


def test_gradient_of_conv_by_one_argument():
    layer, x = nn.conv(2, (2,)), draw(2, 5, 4)
    params = drawn(layer, x)
    assert str(jax.make_jaxpr(jax.grad(lambda p: layer(p, x).sum()))(params)).count("= conv_general_dilated") == 2


def test_max_pool_gradient_of_ties():
    x = jnp.zeros((1, 4, 1))
    grad = lambda layer: jax.jit(jax.grad(lambda x: layer({}, x).sum()))(x).ravel()
    assert grad(nn.max_pool((2,))).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert grad(nn.max_pool((2,), stride=1)).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_max_pool_of_integers():
    x = jnp.array([[1], [3], [-2], [-5], [9]])
    assert jax.jit(nn.max_pool((2,), padding="SAME"))({}, x).ravel().tolist() == [3, -2, 9]
    assert jax.jit(nn.max_pool((2,), stride=1))({}, x).ravel().tolist() == [3, 3, -2, 9]


def test_windows_that_tile_need_no_window_reduction():
    jaxpr = str(jax.make_jaxpr(nn.max_pool((2, 2)))({}, jnp.ones((1, 4, 4, 1))))
    assert "reduce_window" not in jaxpr
    assert "pad" not in jaxpr


def test_flatten():
    assert nn.flatten(jnp.ones((0, 3, 4))).shape == (0, 12)


# Batch norm


def test_batch_norm_is_that_of_flax():
    ours, theirs = nn.batch_norm(momentum=0.9), linen.BatchNorm(momentum=0.9, epsilon=1e-5)
    x, dy = 3 * draw(4, 5, 3) + 1, draw(4, 5, 3, seed=1)
    params, state = drawn(ours, x), {"mean": draw(3), "var": draw(3) ** 2}

    def trained(params, x):
        return ours.apply(params, state, x, train=True)

    def expected(params, x):
        variables = {"params": params, "batch_stats": state}
        y, updated = theirs.apply(variables, x, use_running_average=False, mutable="batch_stats")
        return y, updated["batch_stats"]

    def everything(f):
        y, pull, after = jax.vjp(f, params, x, has_aux=True)
        return y, pull(dy), after

    close(*jax.jit(lambda: (everything(trained), everything(expected)))(), 1e-4)
    y, after = ours.apply(params, state, x, train=False)
    close(y, theirs.apply({"params": params, "batch_stats": state}, x, use_running_average=True))
    assert after is state


def test_batch_norm_statistics_are_float32():
    layer = nn.batch_norm(momentum=0.0)
    x = (draw(512, 2) + 100).astype(jnp.bfloat16)
    params, state = layer.init(KEY, x)
    y, state = jax.jit(lambda: layer.apply(params, state, x, train=True))()
    assert (params["scale"].dtype, y.dtype) == (jnp.bfloat16, jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    close(state, {"mean": wide.mean(0), "var": wide.var(0)}, 1e-4)


# Dropout


def dropped(layer, x, key=KEY):
    return np.asarray(jax.jit(lambda: layer.apply({}, {}, x, key=key, train=True)[0])())


def test_dropout_in_training():
    layer, x = nn.dropout(0.2), np.asarray(draw(100, 100) + 5)
    y = dropped(layer, x)
    kept = y != 0
    assert abs(kept.mean() - 0.8) < 0.02
    np.testing.assert_allclose(y[kept], x[kept] / 0.8, rtol=1e-6)
    np.testing.assert_array_equal(y, dropped(layer, x))
    assert not np.array_equal(y, dropped(layer, x, jax.random.key(8)))


def test_dropout_in_evaluation_is_the_identity():
    x = draw(3)
    assert nn.dropout(0.5).apply({}, {}, x, train=False)[0] is x


@pytest.mark.parametrize("twice", [nn.serial(*[nn.dropout(0.5)] * 2), nn.repeat(nn.dropout(0.5), 2)], ids=str)
def test_each_dropout_has_a_key_of_its_own(twice):
    y = dropped(twice, np.ones(4096, np.float32))
    assert set(y.tolist()) == {0.0, 4.0}
    assert abs((y != 0).mean() - 0.25) < 0.04


# Attention and recurrence


@pytest.mark.parametrize("make", [lambda n: nn.attention(2, causal=True), nn.rnn, nn.lstm, nn.gru])
def test_the_future_does_not_change_the_past(make):
    layer, x = make(8), draw(2, 6, 8)
    params, other = drawn(layer, x), x.at[:, 4:].set(9.0)
    before, after = jax.jit(lambda: (layer(params, x), layer(params, other)))()
    np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-5)
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_attention_and_recurrence_take_any_batch_axes():
    layer, x = nn.serial(nn.attention(2), nn.gru(3)), draw(3, 2, 5, 8)
    params = drawn(layer, x)
    batch_outputs, one = jax.jit(lambda: (layer(params, x), layer(params, x[1, 1])))()
    close(batch_outputs[1, 1], one)


def test_lstm_starts_out_remembering():
    params, _ = jax.jit(nn.lstm(2).init)(KEY, jnp.ones((1, 3, 4)))
    assert params["b"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    for w in np.split(params["w_h"], 4, axis=-1):
        close(w @ w.T, np.eye(2))


def test_recurrence_under_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    layer, x = nn.lstm(3), draw(4, 5, 2)
    params = drawn(layer, x)
    split = jax.shard_map(layer, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
    close(jax.jit(split)(params, x), jax.jit(layer)(params, x))


# Layers put together


def test_serial():
    model = nn.serial(nn.dense(4), jnp.tanh, nn.dense(3))
    x = draw(5, 2)
    params = drawn(model, x)
    assert jax.tree.map(jnp.shape, params) == {
        "dense_0": {"w": (2, 4), "b": (4,)},
        "dense_1": {"w": (4, 3), "b": (3,)},
    }
    first, last = params["dense_0"], params["dense_1"]
    close(model(params, x), np.tanh(x @ first["w"] + first["b"]) @ last["w"] + last["b"])


def test_names_and_scopes():
    block = nn.serial(nn.layer_norm(), nn.attention(2), lambda x: x + 1, nn.dense(4)).named("block")
    model = nn.serial(block, block, nn.dense(2).named("head"))
    x = draw(1, 3, 4)
    params = drawn(model, x)
    assert {name: set(each) for name, each in params.items()} == {
        "block_0": {"layer_norm", "attention", "dense"},
        "block_1": {"layer_norm", "attention", "dense"},
        "head": {"w", "b"},
    }
    block_scopes = ("layer_norm", "attention", "attention/qkv", "attention/out", "lambda", "dense")
    expected = {f"serial/block_{i}/{scope}" for i in (0, 1) for scope in block_scopes} | {"serial/head"}
    names = {scope for scope in scopes(jax.make_jaxpr(model)(params, x)) if "vmap" not in scope}  # JAX's, in attention
    assert names == expected
    assert repr(nn.dense(2).named("head")) == "Layer(name='head')"


def test_a_param_is_read_in_the_scope_of_its_path():
    model = nn.serial(nn.conv(2, (3,)), nn.residual(nn.layer_norm(), nn.dense(2)), nn.attention(1), nn.dense(1))
    x = draw(1, 4, 2)
    params = drawn(model, x)
    closed = jax.make_jaxpr(model)(params, x)
    paths = ["/".join(key.key for key in path[:-1]) for path, _ in jax.tree.leaves_with_path(params)]
    for var, path in zip(closed.jaxpr.invars[:-1], paths, strict=True):
        (reader,) = [eqn for eqn in closed.eqns if any(each is var for each in eqn.invars)]
        assert str(reader.source_info.name_stack) == f"serial/{path}"


def test_state_and_keys_go_through():
    model = nn.serial(nn.dense(4), nn.residual(nn.batch_norm(), nn.dropout(0.5)), nn.batch_norm())
    x = draw(6, 3)
    params, state = jax.jit(model.init)(KEY, x)
    assert list(state) == ["batch_norm", "residual"]
    apply = jax.jit(model.apply, static_argnames="train")
    y, after = apply(params, state, x, key=KEY, train=True)
    assert y.shape == (6, 4)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert not np.allclose(after["batch_norm"]["mean"], 0)
    assert not np.allclose(after["residual"]["batch_norm"]["mean"], 0)
    close(apply(params, after, x, train=False)[1], after, 0)


def test_nothing_in_serial_is_the_identity():
    x = draw(3)
    assert nn.serial().init(KEY, x) == ({}, {})
    assert nn.serial()({}, x) is x


def test_residual():
    model, x = nn.residual(nn.dense(3), jnp.tanh), draw(2, 3)
    params = drawn(model, x)
    close(model(params, x), x + np.tanh(x @ params["dense"]["w"] + params["dense"]["b"]))


def test_repeat_is_serial_unrolled():
    body = nn.serial(nn.residual(nn.layer_norm(), nn.attention(2, causal=True)), nn.dense(4), jnp.tanh).named("block")
    scanned, unrolled, x = nn.repeat(body, 3), nn.serial(body, body, body), draw(2, 5, 4)
    params = drawn(scanned, x)
    apart = {f"block_{i}": jax.tree.map(lambda p: p[i], params["block"]) for i in range(3)}

    def derivatives(f, params):
        y, pull = jax.vjp(f, params, x)
        return y, *pull(y)

    (y, grads, dx), expected = jax.jit(lambda: (derivatives(scanned, params), derivatives(unrolled, apart)))()
    grads_apart = {f"block_{i}": jax.tree.map(lambda p: p[i], grads["block"]) for i in range(3)}
    close((y, grads_apart, dx), expected, 1e-4)

    (scan,) = jax.make_jaxpr(scanned)(params, x).eqns
    assert str(scan.source_info.name_stack) == "repeat"
    assert "block/residual/attention/qkv" in scopes(scan.params["jaxpr"])


def test_repeat_draws_each_layer_anew_and_stacks_states():
    body = nn.serial(nn.dense(3), nn.batch_norm()).named("block")
    model, unrolled, x = nn.repeat(body, 3), nn.serial(body, body, body), draw(5, 3)
    params, state = jax.jit(model.init)(KEY, x)
    assert len(set(params["block"]["dense"]["w"][:, 0, 0].tolist())) == 3
    assert jax.tree.map(jnp.shape, state) == {"block": {"batch_norm": {"mean": (3, 3), "var": (3, 3)}}}
    apart = [{f"block_{i}": jax.tree.map(lambda p: p[i], tree["block"]) for i in range(3)} for tree in (params, state)]
    (y, after), expected = jax.jit(
        lambda: (model.apply(params, state, x, train=True), unrolled.apply(*apart, x, train=True))
    )()
    after_apart = {f"block_{i}": jax.tree.map(lambda p: p[i], after["block"]) for i in range(3)}
    close((y, after_apart), expected, 1e-4)


def test_a_layer_by_hand():
    layer = nn.Layer(
        lambda key, x: ({"k": jnp.ones(())}, {"calls": jnp.zeros((), int)}),
        lambda params, state, x, *, key=None, train: (params["k"] * x, {"calls": state["calls"] + int(train)}),
        "mine",
    )
    model = nn.serial(layer, layer)
    params, state = model.init(KEY, 3.0)
    _, state = model.apply(params, state, 3.0, train=True)
    assert jax.tree.map(int, state) == {"mine_0": {"calls": 1}, "mine_1": {"calls": 1}}


def test_a_layer_made_of_another_keeps_what_is_around_it():
    inner = nn.stateless(lambda key, x: {}, lambda params, x: jnp.tanh(x), "inner")

    @functools.wraps(inner.apply)
    def doubled(*args, **kwargs):
        y, state = inner.apply(*args, **kwargs)
        return 2 * y, state

    outer = nn.Layer(inner.init, doubled, "outer")
    close(nn.serial(outer)({}, draw(3)), 2 * np.tanh(draw(3)))
    assert scopes(jax.make_jaxpr(outer.named("other"))({}, draw(3))) == {"other", "other/inner"}


def test_init_draws_and_computes_no_outputs():
    model = nn.serial(nn.conv(4, (3, 3)), nn.max_pool((2, 2)), nn.flatten, nn.dense(3))
    jaxpr = str(jax.make_jaxpr(model.init)(KEY, jnp.ones((2, 4, 4, 1))))
    assert "conv_general_dilated" not in jaxpr
    assert "dot_general" not in jaxpr


def test_training_learns():
    model = nn.serial(nn.dense(16), nn.batch_norm(), jnp.tanh, nn.dropout(0.1), nn.dense(1))
    x = draw(64, 2)
    target = jnp.sin(2 * x[:, :1])

    def loss(params, state, key):
        y, state = model.apply(params, state, x, key=key, train=True)
        return jnp.mean((y - target) ** 2), state

    def step(carry, key):
        params, state = carry
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, key)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state), value

    losses = jax.jit(lambda: lax.scan(step, model.init(KEY, x), jax.random.split(KEY, 200))[1])()
    assert losses[-1] < 0.3 * losses[0]


# Errors

X = jnp.ones((2, 6))
MESSAGES = {
    "state": (
        lambda: nn.serial(nn.batch_norm())({"batch_norm": {"scale": X[0], "bias": X[0]}}, X),
        """batch_norm needs its state: pass state to apply.
  try     y, state = layer.apply(params, state, x, train=True), state from init; layer(params, x) has none
  in      batch_norm
  in      serial""",
    ),
    "key": (
        lambda: nn.serial(jnp.tanh, nn.dropout(0.5), nn.dropout(0.5))({}, X),
        """dropout needs a key in training: pass key= to apply.
  try     layer.apply(params, state, x, key=key, train=True), or train=False; layer(params, x) has no key
  in      dropout_0
  in      serial""",
    ),
    "features": (
        lambda: nn.dense(3)({"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, X),
        """dense has params for 4 features, and x has 6.
  inputs  x float32[2,6]
  try     init again with this x, or change the layer before
  in      dense""",
    ),
    "rank": (
        lambda: nn.conv(3, (3, 3)).init(KEY, X),
        """conv needs x of shape [..., height, width, channels].
  inputs  x float32[2,6]
  try     move conv before flatten, or add an axis of size 1, as in x[None] or x[..., None]
  in      conv""",
    ),
    "groups": (
        lambda: nn.conv(3, (3,), groups=4).init(KEY, X),
        """conv has 4 groups, and x has 6 channels.
  inputs  x float32[2,6]
  try     groups that divide the channels
  in      conv""",
    ),
    "norm groups": (
        lambda: nn.group_norm(4)({"scale": X[0], "bias": X[0]}, X),
        """group_norm has 4 groups, and x has 6 channels.
  inputs  x float32[2,6]
  try     groups that divide the channels
  in      group_norm""",
    ),
    "heads": (
        lambda: nn.attention(4).init(KEY, X),
        """attention has 4 heads, and x has 6 features.
  inputs  x float32[2,6]
  try     heads that divide the features
  in      attention""",
    ),
    "ids": (
        lambda: nn.embedding(4, 2)({"w": jnp.ones((4, 2))}, X),
        """embedding needs integers.
  inputs  x float32[2,6]
  try     x.astype(jnp.int32)
  in      embedding""",
    ),
    "strangers": (
        lambda: nn.serial(nn.dense(2), jnp.tanh)({"dense_0": {}, "dense_1": {}}, X),
        """params hold ['dense_0', 'dense_1'], and the layers are ['dense', 'tanh'].
  try     pass the params that this layer's own init returned
  in      serial""",
    ),
    "no params": (
        lambda: nn.serial(nn.serial(jnp.tanh, nn.dense(2)))({}, X),
        """params hold nothing for the layer 'dense'.
  try     pass the params that init returned
  in      serial
  in      serial""",
    ),
    "no params in a scan": (
        lambda: nn.repeat(nn.dense(6), 2)({}, X),
        """params hold nothing for the layer 'dense'.
  try     pass the params that init returned
  in      repeat""",
    ),
    "shape": (
        lambda: nn.serial(nn.dense(2)).init(KEY, (5, 4)),
        """init needs an array, or its shape and dtype, and got the tuple (5, 4).
  try     jax.ShapeDtypeStruct((5, 4), jnp.float32)
  in      serial""",
    ),
    "residual": (
        lambda: nn.residual(lambda x: x[:1])({}, X),
        """residual needs layers that keep the shape and the dtype of x.
  inputs  x float32[2,6], y float32[1,6]
  try     end with a layer of as many features as x has, and use params of its dtype
  in      residual""",
    ),
    "repeat": (
        lambda: nn.serial(nn.repeat(nn.dense(3), 2)).init(KEY, X),
        """repeat needs layers that keep the shape and the dtype of x.
  inputs  x float32[2,6], y float32[2,3]
  try     end with a layer of as many features as x has, and use params of its dtype
  in      repeat
  in      serial""",
    ),
    "no layer": (
        lambda: nn.serial(nn.dense(2), 3),
        """3 is neither a layer nor a function of x.
  try     nn.dense(64), or jnp.tanh""",
    ),
    "same name": (
        lambda: nn.serial(nn.dense(2), nn.dense(2), nn.dense(2).named("dense_1")),
        """two layers are named 'dense_1'.
  try     layer.named(...), with a name of its own""",
    ),
}
OPTIONS = {
    "window": (lambda: nn.conv(3, 3), "conv needs a window of 1 to 3 sizes, and got 3."),
    "pool window": (
        lambda: nn.max_pool((2, 2, 2, 2)),
        "max_pool needs a window of 1 to 3 sizes, and got (2, 2, 2, 2).",
    ),
    "stride": (lambda: nn.avg_pool((2, 2), stride=(1,)), "avg_pool has the window (2, 2), and stride=(1,)."),
    "dilation": (lambda: nn.conv(3, (2,), dilation=(1, 1)), "conv has the window (2,), and dilation=(1, 1)."),
    "rate": (lambda: nn.dropout(1.0), "dropout needs a rate from 0 to below 1, and got 1.0."),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    call, expected = MESSAGES[case]
    with pytest.raises(ArgumentError) as caught:
        call()
    text = "".join(traceback.format_exception_only(caught.value)).strip()
    text = re.sub("-+\nFor simplicity, JAX .*\n", "", text)  # JAX's own note, where it comes between two of ours
    assert text == f"funcgrad.transforms.core.errors.ArgumentError: {expected}"


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case):
    call, expected = OPTIONS[case]
    with pytest.raises(OptionError) as caught:
        call()
    assert str(caught.value).splitlines()[0] == expected


def test_options_with_a_next_step():
    for make, expected in [
        (lambda: nn.serial(nn.dense, jnp.tanh), "nn.dense was not called.\n  try     nn.dense(features)"),
        (lambda: nn.repeat(nn.layer_norm, 2), "nn.layer_norm was not called.\n  try     nn.layer_norm()"),
        (
            lambda: nn.max_pool(2),
            "max_pool needs a window of 1 to 3 sizes, and got 2.\n  try     nn.max_pool((2, 2))",
        ),
        (
            lambda: nn.conv(8, 3),
            "conv needs a window of 1 to 3 sizes, and got 3.\n  try     nn.conv(features, (3, 3))",
        ),
    ]:
        with pytest.raises(OptionError) as caught:
            make()
        assert str(caught.value) == expected


def test_a_key_error_of_the_users_own_stays():
    with pytest.raises(KeyError, match="mine"):
        nn.serial(lambda x: {}["mine"])({}, X)


@pytest.mark.parametrize(
    "layer", [nn.serial(jnp.tanh), nn.residual(jnp.tanh), nn.repeat(nn.dense(6), 2), nn.dropout(0.5), nn.batch_norm()]
)
def test_missing_arguments_are_said_of_the_layer(layer):
    for call, role in ((lambda: layer.apply({}, {}, X), "apply"), (lambda: layer.init(KEY), "init")):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value).startswith(f"{layer.name}.{role}() missing 1 required ")


@each_layer
def test_too_few_axes(name):
    layer, _, _ = LAYERS[name]
    with pytest.raises(ArgumentError, match=rf"{layer.name} needs x of shape \[\.\.\., "):
        layer.apply(*nothing(layer), jnp.ones(()), train=False)


def nothing(layer):
    """Params and a state whose leaves are of no use."""
    leaf = jnp.ones((1, 1))
    keys = ("w", "b", "w_x", "w_h", "scale", "bias")
    return dict.fromkeys(keys, leaf) | {"qkv": {}, "out": {}}, {}


def test_import_is_cheap():
    code = """
import sys, jax
before = set(sys.modules)
import funcgrad.nn
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"flax", "equinox", "sklearn", "optax", "matplotlib"}, new
"""
    subprocess.run([sys.executable, "-c", code], check=True)
