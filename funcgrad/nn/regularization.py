"""Dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..transforms.core.errors import ArgumentError, OptionError
from .layer import Layer


def dropout(rate: float) -> Layer:
    """In training, each element is 0 with probability `rate`, else x / (1 − rate). In evaluation, the identity.

    Raises:
      OptionError: `rate` is not in [0, 1).
      ArgumentError: from `apply` with train=True and no key, and from `layer(params, x)`.

    Source: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.

    >>> y, _ = dropout(0.5).apply({}, {}, jnp.ones(4), key=jax.random.key(0), train=True)
    >>> set(y.tolist()) <= {0.0, 2.0}
    True
    """
    if not 0 <= rate < 1:
        raise OptionError(f"dropout needs a rate from 0 to below 1, and got {rate}.")

    def apply(params, state, x, *, key=None, train):
        if not train:
            return x, {}
        if key is None:
            hint = "layer.apply(params, state, x, key=key, train=True), or train=False; layer(params, x) has no key"
            raise ArgumentError("dropout needs a key in training: pass key= to apply.", hint=hint)
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0), {}

    return Layer(lambda key, x: ({}, {}), apply, "dropout")
