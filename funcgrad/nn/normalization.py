"""Normalisation: y = scale · (x − μ) / √(σ² + ε) + bias, where each layer takes μ and σ² over other axes.

Mean and variance are taken in float32 (float64 for float64), and the output has the dtype of x.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ..transforms.core.errors import ArgumentError
from .layer import Layer, check, float_dtype, shown, stateless, wide_dtype


def batch_norm(*, momentum: float = 0.99, epsilon: float = 1e-5) -> Layer:
    """μ and σ² per channel, over all other axes: float[..., c] to float[..., c].

    In training they are the batch's own, and the state, `mean` and `var` of float32[c], moves towards them:
    momentum · old + (1 − momentum) · new. In evaluation they are the state's. σ² is the biased variance in both.

    Args:
      momentum: what the state keeps of itself in each step.
      epsilon: ε.
    Raises:
      ArgumentError: called without its state, or x has other channels than the params.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.

    >>> layer, x = batch_norm(), jnp.array([[1.0], [3.0]])
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> y, state = layer.apply(params, state, x, train=True)
    >>> state["mean"]
    Array([0.02], dtype=float32)
    """

    def init(key, x):
        check("batch_norm", x, "channels")
        size, dtype = x.shape[-1:], wide_dtype(float_dtype(x))
        return _affine(x), {"mean": jnp.zeros(size, dtype), "var": jnp.ones(size, dtype)}

    def apply(params, state, x, *, key=None, train):
        if not state:
            raise ArgumentError(
                "batch_norm needs its state: pass state to apply.",
                hint="y, state = layer.apply(params, state, x, train=True), state from init; layer(params, x) has none",
            )
        check("batch_norm", x, "channels", len(params["scale"]))
        mean, var = state["mean"], state["var"]
        if train:
            mean, var = _moments(x, tuple(range(x.ndim - 1)))
            mean, var = mean.reshape(-1), var.reshape(-1)
            new = {"mean": mean, "var": var}
            state = {name: momentum * state[name] + (1 - momentum) * new[name] for name in new}
        return _normalize(params, x, mean, var, epsilon), state

    return Layer(init, apply, "batch_norm")


def layer_norm(*, epsilon: float = 1e-5) -> Layer:
    """μ and σ² over the last axis: float[..., c] to float[..., c].

    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.

    >>> layer, x = layer_norm(), jnp.array([[1.0, 3.0]])
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).round(3)
    Array([[-1.,  1.]], dtype=float32)
    """

    def call(params, x):
        check("layer_norm", x, "features", len(params["scale"]))
        return _normalize(params, x, *_moments(x, -1), epsilon)

    return stateless(lambda key, x: _affine(x), call, "layer_norm")


def group_norm(groups: int, *, epsilon: float = 1e-5) -> Layer:
    """μ and σ² per example and group of channels: float[n, ..., c] to float[n, ..., c].

    Raises:
      ArgumentError: x has fewer than 2 axes, or `groups` does not divide its channels.

    Source: Wu & He 2018, arXiv:1803.08494.

    >>> layer, x = group_norm(2), jnp.arange(8.0).reshape(1, 2, 4)
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).shape
    (1, 2, 4)
    """

    def call(params, x):
        check("group_norm", x, "batch, channels", len(params["scale"]))
        if x.shape[-1] % groups:
            raise ArgumentError(
                f"group_norm has {groups} groups, and x has {x.shape[-1]} channels.",
                inputs=f"x {shown(x)}",
                hint="groups that divide the channels",
            )
        cut = x.reshape(len(x), math.prod(x.shape[1:-1]), groups, x.shape[-1] // groups)
        mean, var = (
            jnp.repeat(m.reshape(len(x), *[1] * (x.ndim - 2), groups), x.shape[-1] // groups, axis=-1)
            for m in _moments(cut, (1, 3))
        )
        return _normalize(params, x, mean, var, epsilon)

    return stateless(lambda key, x: _affine(x), call, "group_norm")


def rms_norm(*, epsilon: float = 1e-5) -> Layer:
    """scale · x / √(mean(x²) + ε) over the last axis, without μ and bias: float[..., c] to float[..., c].

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.

    >>> layer, x = rms_norm(), jnp.array([[3.0, -3.0]])
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).round(3)
    Array([[ 1., -1.]], dtype=float32)
    """

    def init(key, x):
        return {"scale": _affine(x)["scale"]}

    def call(params, x):
        check("rms_norm", x, "features", len(params["scale"]))
        wide = x.astype(wide_dtype(x.dtype))
        y = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + epsilon)
        return (y * params["scale"].astype(y.dtype)).astype(x.dtype)

    return stateless(init, call, "rms_norm")


def _affine(x):
    dtype = float_dtype(x)
    return {"scale": jnp.ones(x.shape[-1:], dtype), "bias": jnp.zeros(x.shape[-1:], dtype)}


def _moments(x, axes):
    x = x.astype(wide_dtype(x.dtype))
    mean = jnp.mean(x, axes, keepdims=True)
    return mean, jnp.mean((x - mean) ** 2, axes, keepdims=True)


def _normalize(params, x, mean, var, epsilon):
    dtype = mean.dtype
    y = (x.astype(dtype) - mean) * (jax.lax.rsqrt(var + epsilon) * params["scale"].astype(dtype))
    return (y + params["bias"].astype(dtype)).astype(x.dtype)
