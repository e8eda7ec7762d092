"""Normalisation: y = scale · (x − μ) / √(σ² + ε) + bias. The layers differ in the axes of the mean μ and the variance σ².

Mean and variance are computed in float32 (float64 for float64); the output has the dtype of x.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ..transforms.core.errors import ArgumentError
from .layer import Layer, check_axes, check_divides, float_dtype, stateless, wide_dtype


def batch_norm(*, momentum: float = 0.99, epsilon: float = 1e-5) -> Layer:
    """μ and σ² per channel, over all other axes: float[..., c] to float[..., c].

    In training, μ and σ² are those of the batch, and the state, `mean` and `var` of float32[c], is their moving average:
    momentum · old + (1 − momentum) · new. In evaluation, μ and σ² are the state. σ² is the biased variance in both.

    Args:
      momentum: weight of the old state in each step.
      epsilon: ε.
    Raises:
      ArgumentError: called without its state, or x and the params differ in the number of channels.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.

    >>> layer, x = batch_norm(), jnp.array([[1.0], [3.0]])
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> y, state = layer.apply(params, state, x, train=True)
    >>> state["mean"]
    Array([0.02], dtype=float32)
    """

    def init(key, x):
        check_axes("batch_norm", x, "channels")
        size, dtype = x.shape[-1:], wide_dtype(float_dtype(x))
        return _affine(x), {"mean": jnp.zeros(size, dtype), "var": jnp.ones(size, dtype)}

    def apply(params, state, x, *, key=None, train):
        if not state:
            hint = "y, state = layer.apply(params, state, x, train=True), state from init; layer(params, x) has none"
            raise ArgumentError("batch_norm needs its state: pass state to apply.", hint=hint)
        check_axes("batch_norm", x, "channels", len(params["scale"]))
        mean, var = state["mean"], state["var"]
        if train:
            mean, var = (moment.reshape(-1) for moment in _moments(x, tuple(range(x.ndim - 1))))
            moments = {"mean": mean, "var": var}
            state = {name: momentum * state[name] + (1 - momentum) * moments[name] for name in moments}
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
        check_axes("layer_norm", x, "features", len(params["scale"]))
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
        check_axes("group_norm", x, "batch, channels", len(params["scale"]))
        check_divides("group_norm", groups, "groups", x, "channels")
        size, shape = x.shape[-1] // groups, (len(x), *[1] * (x.ndim - 2), groups)
        moments = _moments(x.reshape(len(x), math.prod(x.shape[1:-1]), groups, size), (1, 3))
        mean, var = (jnp.repeat(moment.reshape(shape), size, axis=-1) for moment in moments)
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

    def call(params, x):
        check_axes("rms_norm", x, "features", len(params["scale"]))
        wide = x.astype(wide_dtype(x.dtype))
        y = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + epsilon)
        return (y * params["scale"].astype(y.dtype)).astype(x.dtype)

    return stateless(lambda key, x: {"scale": _affine(x)["scale"]}, call, "rms_norm")


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
