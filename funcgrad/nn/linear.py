"""Layers that are one matrix: dense and embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, lecun_normal, normal, zeros

from ..transforms.core.errors import ArgumentError
from .layer import Layer, check, float_dtype, shown, stateless


def dense(features: int, *, w: Initializer = lecun_normal(), b: Initializer | None = zeros) -> Layer:
    """x @ w + b over the last axis: float[..., m] to float[..., features].

    Args:
      features: size of the last axis of the output.
      w: initialiser of `w`, float[m, features].
      b: initialiser of `b`, float[features]; None for no bias.
    Raises:
      ArgumentError: from `apply`, where x is a scalar, or m is not that of `w`.

    >>> layer = dense(3)
    >>> params, state = layer.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> layer(params, jnp.ones((2, 4))).shape
    (2, 3)
    """

    def init(key, x):
        check("dense", x, "features")
        dtype, keys = float_dtype(x), jax.random.split(key)
        params = {"w": w(keys[0], (x.shape[-1], features), dtype)}
        return params if b is None else params | {"b": b(keys[1], (features,), dtype)}

    def call(params, x):
        check("dense", x, "features", len(params["w"]))
        y = (
            x.reshape(-1, x.shape[-1]) @ params["w"]
        )  # XLA:CPU multiplies matrices faster than it contracts batches of them
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if b is None else y + params["b"]

    return stateless(init, call, "dense")


def embedding(count: int, features: int, *, dtype=jnp.float32, w: Initializer = normal(1.0)) -> Layer:
    """Row x of a table: int[...] to float[..., features]. A row at or past `count` reads as NaN.

    Args:
      count: number of rows.
      features: size of a row.
      dtype: of the table `w`, and so of the output.
      w: initialiser of `w`, float[count, features].
    Raises:
      ArgumentError: x does not hold integers.

    >>> layer = embedding(10, 4)
    >>> params, state = layer.init(jax.random.key(0), jnp.array([3, 1]))
    >>> layer(params, jnp.array([3, 1])).shape
    (2, 4)
    """

    def init(key, x):
        return {"w": w(key, (count, features), dtype)}

    def call(params, x):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ArgumentError("embedding needs integers.", inputs=f"x {shown(x)}", hint="x.astype(jnp.int32)")
        return jnp.take(params["w"], x, axis=0, mode="fill", fill_value=jnp.nan)

    return stateless(init, call, "embedding")
