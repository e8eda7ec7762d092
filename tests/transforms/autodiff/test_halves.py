"""The halves of a gradient: run one after the other they are JAX's own vjp, and what lies between them is named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

from ...checks import assert_same_program
from ...corpus import CORPUS
from ...sampling import sampled

DIFFERENTIABLE = [p for p in CORPUS if "grad" not in p.lacks]
W, X = jnp.full((3, 3), 0.3), jnp.ones((2, 3))


def is_inexact(x):
    return jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact)


def pulled(f, diff, args):
    """JAX's own: the output of `f`, and what its vjp makes of ones; None for integers."""
    numbers = (diff,) if isinstance(diff, int) else diff

    def of_chosen(*values):
        chosen = dict(zip(numbers, values, strict=True))
        return f(*(chosen.get(k, x) for k, x in enumerate(args)))

    out, pull = jax.vjp(of_chosen, *(args[k] for k in numbers))
    ones = lambda x: jnp.ones_like(x) if is_inexact(x) else np.zeros(jnp.shape(x), jax.dtypes.float0)
    grads = pull(jax.tree.map(ones, out))
    grads = jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, grads)
    return out, grads[0] if isinstance(diff, int) else grads


SAMPLE = (
    "branches_in_loops",
    "checkpoint",
    "custom_jvp_in_loops",
    "custom_vjp_in_loops",
    "dense",
    "integer_inputs",
    "key_arrays",
    "references",
    "scan_tree_carry",
    "shard_map",
    "weak_types",
    "zero_size",
)


@pytest.mark.parametrize("p", sampled(DIFFERENTIABLE, SAMPLE))
def test_the_halves_are_jax_vjp(p):
    halves = fg.halves(fg.trace(p.f, *p.args), p.diff)
    fg.verify(halves.forward), fg.verify(halves.backward)

    def both(*args):
        out, kept = halves.forward(*args)
        ones = jax.tree.map(lambda x: jnp.ones_like(x) if is_inexact(x) else None, out)
        return out, halves.backward(kept, ones)

    assert_same_program(both, lambda *args: pulled(p.f, p.diff, args), p.args, is_graph=True)
    assert str(halves)
    kept = halves.forward.out_avals[halves.forward.out_tree.num_leaves - len(halves.residuals) :]
    for residual, aval in zip(halves.residuals, kept, strict=True):
        assert (residual.shape, residual.dtype) == (aval.shape, aval.dtype)


def model(params, x):
    def cell(carry, w):
        with jax.named_scope("cell"):
            carry = jnp.sin(carry @ w)
        return carry, jnp.sum(carry)

    with jax.named_scope("encoder"):
        x = jnp.exp(x @ params["w"])
    x, sums = lax.scan(cell, x, jnp.stack([params["w"]] * 5))
    x = jax.jit(jnp.cos)(x)
    return jnp.sum(x) + jnp.sum(sums)


def test_each_residual_says_what_made_it():
    halves = fg.halves(fg.trace(model, {"w": W}, X), argnums=(0, 1))
    by_path = {r.path: r for r in halves.residuals}
    assert {"params['w']", "x", "encoder/exp#0", "cell/cos#0", "sin#0"} <= set(by_path)

    cosine = by_path["cell/cos#0"]
    assert (cosine.shape, cosine.dtype, cosine.bytes) == ((5, 2, 3), jnp.float32, 5 * 2 * 3 * 4)
    assert cosine.eqn.primitive is lax.cos_p
    assert "test_halves.py" in cosine.line
    assert "cell" in cosine.line
    argument = by_path["x"]
    assert (argument.eqn, argument.line, argument.bytes) == (None, None, 24)
    assert halves.bytes == sum(r.bytes for r in halves.residuals) - by_path["x"].bytes - by_path["params['w']"].bytes


def shared(x):
    inner = jax.jit(lambda x: jnp.tanh(jnp.tanh(x)) * x)
    with jax.named_scope("a"):
        x = jnp.tanh(inner(inner(x)))
    return jnp.sum(jnp.tanh(jnp.exp(2 * x)) * jax.jit(inner)(x))


@pytest.mark.parametrize("f", [shared, lambda x: jnp.tanh(x) * x, lambda x: jnp.sin(x)[0] * jnp.cos(x)[1]])
def test_residuals_have_the_order_and_the_names_of_a_tap(f):
    x = jnp.linspace(0.1, 1.0, 3)
    halves = fg.halves(fg.trace(f, x))
    computed = [r for r in halves.residuals if r.eqn is not None]
    assert len(computed) > 1
    ((_, kept), seen) = fg.tap(halves.forward, where=lambda site: site.primitive.name != "jit")(x)
    paths = [r.path for r in computed]
    assert paths == [path for path in seen if path in set(paths)]
    for residual, value in zip(halves.residuals, kept, strict=True):
        np.testing.assert_array_equal(value, x if residual.eqn is None else seen[residual.path])


def test_what_a_graph_closes_over_is_a_constant():
    def f(x, c):
        halves = fg.halves(fg.trace(lambda x: x * c, x))
        assert [r.path for r in halves.residuals] == ["constant"]
        return halves.backward(halves.forward(x)[1], jnp.ones_like(x))

    np.testing.assert_array_equal(jax.jit(f)(X, 3 * X), 3 * X)


def test_what_is_kept_is_what_the_residuals_say():
    halves = fg.halves(fg.trace(model, {"w": W}, X))
    _, kept = halves.forward({"w": W}, X)
    for residual, value in zip(halves.residuals, kept, strict=True):
        assert (residual.shape, residual.dtype, residual.bytes) == (value.shape, value.dtype, value.nbytes)
    exp = kept[[r.path for r in halves.residuals].index("encoder/exp#0")]
    np.testing.assert_allclose(exp, np.exp(X @ W), rtol=1e-6)


def test_recomputing_keeps_less():
    layers = lambda f: lambda w, x: jnp.sum(f(w, f(w, f(w, x))))
    layer = lambda w, x: jnp.tanh(jnp.sin(jnp.exp(x @ w)))
    plain = fg.halves(fg.trace(layers(layer), W, X))
    remat = fg.halves(fg.trace(layers(jax.checkpoint(layer)), W, X))
    assert remat.bytes < plain.bytes
    args = lambda h: h.backward(h.forward(W, X)[1], jnp.float32(1))
    np.testing.assert_allclose(args(remat), args(plain), rtol=1e-6)


def test_halves_of_rules():
    halved = {lax.sin_p: lambda eqn, x: lax.sin(x) / 2 + lax.stop_gradient(lax.sin(x) / 2)}
    halves = fg.halves(fg.trace(lambda x: jnp.sin(x), 1.0), rules=halved)
    out, kept = halves.forward(1.0)
    assert out == jnp.sin(1.0)
    np.testing.assert_allclose(halves.backward(kept, 1.0), jnp.cos(1.0) / 2, rtol=1e-6)


def test_halves_work_under_transforms():
    graph = fg.trace(model, {"w": W}, X)
    halves = fg.halves(graph, argnums=1)

    def gradient(x):
        out, kept = halves.forward({"w": W}, x)
        return halves.backward(kept, jnp.ones_like(out))

    xs = jnp.stack([X, 2 * X])
    want = jax.vmap(jax.grad(lambda x: model({"w": W}, x)))(xs)
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(xs), want, rtol=1e-5)
    tangent = jax.jvp(gradient, (X,), (X,))[1]
    np.testing.assert_allclose(
        tangent, jax.jvp(jax.grad(lambda x: model({"w": W}, x)), (X,), (X,))[1], rtol=1e-4, atol=1e-6
    )


def test_the_text():
    def loss(params, x):
        with jax.named_scope("encoder"):
            x = jnp.sin(x @ params["w"])
        return jnp.sum(x)

    text = str(fg.halves(fg.trace(loss, {"w": W}, X)))
    head, sizes, columns, *rows = text.splitlines()
    assert head.startswith("forward(loss): ")
    assert sizes == "residuals: 24 B computed, 24 B of arguments"
    assert columns.split() == ["bytes", "type", "path", "equation", "line"]
    assert [row.split()[:4] for row in rows] == [
        ["24", "f32[2,3]", "x"],
        ["24", "f32[2,3]", "encoder/cos#0", "cos"],
    ]
    assert "test_halves.py:" in rows[-1]


def test_what_cannot_be_halved_is_named():
    with pytest.raises(TypeError, match=r"halves takes a Graph, and got function"):
        fg.halves(lambda x: x)
    graph = fg.trace(lambda n, x: x * n.astype(float), jnp.arange(3), jnp.float32(1))
    with pytest.raises(TypeError, match="halves differentiates <lambda> with respect to n, which holds int32") as e:
        fg.halves(graph)
    assert "allow_int" not in str(e.value)
    with pytest.raises(TypeError, match="needs 3 positional arguments"):
        fg.halves(graph, argnums=2)
    with pytest.raises(TypeError):
        fg.halves(graph, argnums=1.0)
    assert fg.halves(graph, argnums=np.int64(1)).backward.out_avals[0].shape == ()
