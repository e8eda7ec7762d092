"""Models as pure functions: a layer is `init` and `apply`, params are nested dicts, each layer is a scope of the graph.

>>> import jax, jax.numpy as jnp
>>> mlp = serial(dense(64), jnp.tanh, dense(10))
>>> key, x = jax.random.key(0), jnp.ones((8, 28))
>>> params, state = mlp.init(key, x)
>>> params["dense_0"]["w"].shape, mlp(params, x).shape
((28, 64), (8, 10))

Layers with state (batch_norm) or a key (dropout) take these, and return the new state:

>>> model = serial(dense(64), batch_norm(), jnp.tanh, dropout(0.1), dense(10))
>>> params, state = model.init(key, x)
>>> y, state = model.apply(params, state, x, key=key, train=True)
>>> y, _ = model.apply(params, state, x, train=False)
"""

from .attention import attention
from .convolution import avg_pool, conv, flatten, max_pool
from .layer import Layer, repeat, residual, serial, stateless
from .linear import dense, embedding
from .normalization import batch_norm, group_norm, layer_norm, rms_norm
from .recurrence import gru, lstm, rnn
from .regularization import dropout

__all__ = ["Layer", "repeat", "residual", "serial", "stateless"]
__all__ += ["attention", "avg_pool", "conv", "dense", "dropout", "embedding", "flatten", "max_pool"]
__all__ += ["batch_norm", "group_norm", "gru", "layer_norm", "lstm", "rms_norm", "rnn"]
