"""Layers that are one matrix: dense and embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, lecun_normal, normal, zeros

from ..transforms.core.errors import ArgumentError
from .layer import Layer, check_axes, float_dtype, stateless, type_text


def dense(features: int, *, w: Initializer = lecun_normal(), b: Initializer | None = zeros) -> Layer:
    """x @ w + b over the last axis: float[..., m] to float[..., features].

    Args:
      features: size of the last axis of the output.
      w: initialiser of `w`, float[m, features].
      b: initialiser of `b`, float[features]; None for no bias.
    Raises:
      ArgumentError: from `apply`, if x is a scalar, or m differs from that of `w`.

    >>> layer = dense(3)
    >>> params, state = layer.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> layer(params, jnp.ones((2, 4))).shape
    (2, 3)
    """

    def init(key, x):
        check_axes("dense", x, "features")
        return weight_and_bias(key, x, (x.shape[-1], features), w, b)

    def call(params, x):
        check_axes("dense", x, "features", len(params["w"]))
        # On CPU, XLA multiplies two matrices faster than it contracts batches of matrices.
        y = x.reshape(-1, x.shape[-1]) @ params["w"]
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if b is None else y + params["b"]

    return stateless(init, call, "dense")


def weight_and_bias(key, x, shape: tuple, w: Initializer, b: Initializer | None) -> dict[str, jax.Array]:
    """Params for x: `w` of `shape`, and `b` of its last size unless its initialiser is None."""
    dtype, keys = float_dtype(x), jax.random.split(key)
    params = {"w": w(keys[0], shape, dtype)}
    return params if b is None else params | {"b": b(keys[1], shape[-1:], dtype)}


def embedding(count: int, features: int, *, dtype=jnp.float32, w: Initializer = normal(1.0)) -> Layer:
    """Row x of a table: int[...] to float[..., features]. Rows at or past `count` are NaN.

    Args:
      count: number of rows.
      features: size of a row.
      dtype: dtype of the table `w` and of the output.
      w: initialiser of `w`, float[count, features].
    Raises:
      ArgumentError: x does not hold integers.

    >>> layer = embedding(10, 4)
    >>> params, state = layer.init(jax.random.key(0), jnp.array([3, 1]))
    >>> layer(params, jnp.array([3, 1])).shape
    (2, 4)
    """

    def call(params, x):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ArgumentError("embedding needs integers.", inputs=f"x {type_text(x)}", hint="x.astype(jnp.int32)")
        return jnp.take(params["w"], x, axis=0, mode="fill", fill_value=jnp.nan)

    return stateless(lambda key, x: {"w": w(key, (count, features), dtype)}, call, "embedding")
