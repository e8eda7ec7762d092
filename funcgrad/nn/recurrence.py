"""Recurrent layers: a scan over time that starts from zeros and returns h of every step.

Symbols of the papers: x input, h output, c cell, σ the logistic function. `w_x`, `w_h` and `b` concatenate the gates, so
a step is two matrix products. The product with x stays inside the loop: training is slower if it is hoisted.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import sigmoid
from jax.nn.initializers import Initializer, lecun_normal, orthogonal

from .layer import Layer, check_axes, float_dtype, stateless, wide_dtype


def rnn(features: int, *, w_x: Initializer = lecun_normal(), w_h: Initializer = orthogonal()) -> Layer:
    """h = tanh(x w_x + h w_h + b): float[..., time, m] to float[..., time, features].

    Args:
      features: size of h.
      w_x: initialiser of `w_x`, float[m, features].
      w_h: initialiser of `w_h`, float[features, features].
    Raises:
      ArgumentError: x has fewer than 2 axes, or m differs from that of `w_x`.

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1.

    >>> layer, x = rnn(8), jnp.ones((2, 5, 3))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).shape
    (2, 5, 8)
    """

    def cell(params, x, h):
        return (jnp.tanh(x @ params["w_x"] + h @ params["w_h"] + params["b"]),)

    return _recurrent("rnn", features, w_x, w_h, {"b": (0,)}, cell)


def lstm(features: int, *, w_x: Initializer = lecun_normal(), w_h: Initializer = orthogonal()) -> Layer:
    """Long short-term memory: float[..., time, m] to float[..., time, features].

    i, f, g, o = x w_x + h w_h + b;  c = σ(f) c + σ(i) tanh(g);  h = σ(o) tanh(c). The bias of f starts at 1.

    Args:
      features: size of h and of c.
      w_x: initialiser of each gate's part of `w_x`, float[m, 4 · features].
      w_h: initialiser of each gate's part of `w_h`, float[features, 4 · features].
    Raises:
      ArgumentError: x has fewer than 2 axes, or m differs from that of `w_x`.

    Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; the gate f: Gers et al. 2000,
      doi:10.1162/089976600300015015.

    >>> layer, x = lstm(8), jnp.ones((2, 5, 3))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).shape, params["w_h"].shape
    ((2, 5, 8), (8, 32))
    """

    def cell(params, x, h, c):
        i, f, g, o = jnp.split(x @ params["w_x"] + h @ params["w_h"] + params["b"], 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        return sigmoid(o) * jnp.tanh(c), c

    return _recurrent("lstm", features, w_x, w_h, {"b": (0, 1, 0, 0)}, cell, carries=2)


def gru(features: int, *, w_x: Initializer = lecun_normal(), w_h: Initializer = orthogonal()) -> Layer:
    """Gated recurrent unit: float[..., time, m] to float[..., time, features].

    r, z, n = x w_x + b;  r', z', n' = h w_h;  h = (1 − σ(z + z')) tanh(n + σ(r + r') (n' + b_n)) + σ(z + z') h.
    The reset gate r multiplies after the matrix product, as in cuDNN; in the paper, before it.

    Args:
      features: size of h.
      w_x: initialiser of each gate's part of `w_x`, float[m, 3 · features].
      w_h: initialiser of each gate's part of `w_h`, float[features, 3 · features].
    Raises:
      ArgumentError: x has fewer than 2 axes, or m differs from that of `w_x`.

    Source: Cho et al. 2014, arXiv:1406.1078.

    >>> layer, x = gru(8), jnp.ones((2, 5, 3))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).shape, params["w_h"].shape
    ((2, 5, 8), (8, 24))
    """

    def cell(params, x, h):
        from_x = jnp.split(x @ params["w_x"] + params["b"], 3, axis=-1)
        from_h = jnp.split(h @ params["w_h"], 3, axis=-1)
        r, z = (sigmoid(a + b) for a, b in zip(from_x[:2], from_h[:2], strict=True))
        n = jnp.tanh(from_x[2] + r * (from_h[2] + params["b_n"]))
        return ((1 - z) * n + z * h,)

    return _recurrent("gru", features, w_x, w_h, {"b": (0, 0, 0), "b_n": (0,)}, cell)


def _recurrent(name: str, features: int, w_x, w_h, biases: dict[str, tuple], cell: Callable, carries: int = 1) -> Layer:
    """The layer that scans `cell(params, x, *carry) -> carry`, h first. `biases` are the initial values, one per gate."""

    def gates(w, key, rows, dtype):
        keys = jax.random.split(key, len(biases["b"]))
        parts = [w(k, (rows, features), wide_dtype(dtype)) for k in keys]  # JAX's orthogonal does not support bfloat16
        return jnp.concatenate(parts, axis=-1).astype(dtype)

    def init(key, x):
        check_axes(name, x, "time, features")
        dtype, keys = float_dtype(x), jax.random.split(key)
        params = {"w_x": gates(w_x, keys[0], x.shape[-1], dtype), "w_h": gates(w_h, keys[1], features, dtype)}
        return params | {b: jnp.repeat(jnp.array(values, dtype), features) for b, values in biases.items()}

    def call(params, x):
        check_axes(name, x, "time, features", len(params["w_x"]))

        def step(carry, x):
            carry = cell(params, x, *carry)
            return carry, carry[0]

        zeros = lax.full_like(x, 0, jnp.result_type(x, params["w_x"]), (*x.shape[:-2], features))
        _, y = lax.scan(step, (zeros,) * carries, jnp.moveaxis(x, -2, 0))
        return jnp.moveaxis(y, 0, -2)

    return stateless(init, call, name)
