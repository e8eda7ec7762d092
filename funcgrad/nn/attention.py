"""Multi-head self-attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, lecun_normal

from .layer import Layer, check_axes, check_divides, stateless
from .linear import dense


def attention(heads: int, *, causal: bool = False, w: Initializer = lecun_normal()) -> Layer:
    """softmax(q kᵀ / √(m / heads)) v in each head: float[..., time, m] to the same shape.

    Its params are two dense layers, `qkv` from m to 3m (one product for q, k and v) and `out` from m to m.

    Args:
      heads: number of heads, each of m / heads features.
      causal: whether a time step attends to itself and the past only.
      w: initialiser of both matrices.
    Raises:
      ArgumentError: x has fewer than 2 axes, `heads` does not divide m, or m differs from that of the params.

    Source: Vaswani et al. 2017, arXiv:1706.03762.

    >>> layer, x = attention(2, causal=True), jnp.ones((3, 5, 8))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).shape
    (3, 5, 8)
    """

    def projections(x):
        check_axes("attention", x, "time, features")
        check_divides("attention", heads, "heads", x, "features")
        return dense(3 * x.shape[-1], w=w).named("qkv"), dense(x.shape[-1], w=w).named("out")

    def init(key, x):
        keys = jax.random.split(key)
        return {layer.name: layer.init(k, x)[0] for layer, k in zip(projections(x), keys, strict=True)}

    def call(params, x):
        qkv, out = projections(x)
        *batch, time, features = x.shape
        shape = (math.prod(batch), time, heads, features // heads)
        q, k, v = (part.reshape(shape) for part in jnp.split(qkv(params["qkv"], x), 3, axis=-1))
        with jax.numpy_dtype_promotion("standard"):  # inside, JAX promotes even equal dtypes to at least float32
            y = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        return out(params["out"], y.reshape(x.shape))

    return stateless(init, call, "attention")
