"""Four models, each twice: with `fg.nn`, and handwritten in plain JAX with the same mathematics and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcgrad import nn

CHARACTERS, FEATURES, HEADS, BLOCKS, TIME = 64, 128, 4, 4, 128


@dataclass(frozen=True)
class Model:
    """A layer, the same function handwritten, and the shapes of its training data.

    Attributes:
      by_hand: `(params, x) -> logits`, with the parameters of the layer.
      x: shape and dtype of an input; int32 for characters.
      labels: shape of the labels, integers below 10.
      chunk: number of steps per dispatch to compare with 1.
      steps: number of timed steps.
      auto_steps: number of timed steps with chunk="auto", enough to try longer chunks. 0 if the steps are too long to gain.
    """

    name: str
    layer: nn.Layer
    by_hand: Callable[[Any, jax.Array], jax.Array]
    x: jax.ShapeDtypeStruct
    labels: tuple[int, ...]
    chunk: int
    steps: int
    auto_steps: int = 0

    def params(self) -> Any:
        return jax.jit(lambda key: self.layer.init(key, self.x)[0])(jax.random.key(0))

    def batches(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Random inputs and labels."""
        rng = np.random.default_rng(0)
        is_text = self.x.dtype == jnp.int32
        draw = lambda: rng.integers(0, CHARACTERS, self.x.shape) if is_text else rng.normal(size=self.x.shape)
        return [(draw().astype(self.x.dtype), rng.integers(0, 10, self.labels, np.int32)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ the models, by hand


def dense(params, x):
    """A dense layer as one product of two matrices. XLA for CPU runs it faster than a batch of products."""
    y = x.reshape(-1, x.shape[-1]) @ params["w"]
    return y.reshape(*x.shape[:-1], y.shape[-1]) + params["b"]


def mlp(params, x):
    x = jax.nn.relu(dense(params["dense_0"], x))
    return dense(params["dense_2"], jax.nn.relu(dense(params["dense_1"], x)))


def lenet(params, x):
    for name in ("conv_0", "conv_1"):
        w, b = params[name]["w"], params[name]["b"]
        x = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + b
        n, height, width, channels = x.shape
        x = jax.nn.relu(x).reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
    return dense(params["dense_1"], jax.nn.relu(dense(params["dense_0"], x.reshape(len(x), -1))))


def transformer(params, x):
    x = params["embedding"]["w"][x] + params["position"]["w"]
    for k in range(BLOCKS):
        block = params[f"block_{k}"]["residual_0"], params[f"block_{k}"]["residual_1"]
        x = x + attention(block[0]["attention"], norm(block[0]["layer_norm"], x))
        y = jax.nn.gelu(dense(block[1]["dense_0"], norm(block[1]["layer_norm"], x)))
        x = x + dense(block[1]["dense_1"], y)
    return dense(params["dense"], norm(params["layer_norm"], x))


def norm(params, x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def attention(params, x):
    q, k, v = (y.reshape(*x.shape[:2], HEADS, -1) for y in jnp.split(dense(params["qkv"], x), 3, axis=-1))
    return dense(params["out"], jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


def lstm(params, x):
    x, cell = params["embedding"]["w"][x], params["lstm"]

    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ cell["w_x"] + h @ cell["w_h"] + cell["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((len(x), FEATURES))
    return dense(params["dense"], lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[1].swapaxes(0, 1))


# ------------------------------------------------------------------------------------------------ the same of layers

RELU = jax.nn.relu
BLOCK = nn.serial(
    nn.residual(nn.layer_norm(), nn.attention(HEADS, causal=True)),
    nn.residual(nn.layer_norm(), nn.dense(4 * FEATURES), jax.nn.gelu, nn.dense(FEATURES)),
).named("block")
POSITION = nn.stateless(
    lambda key, x: {"w": 0.02 * jax.random.normal(key, x.shape[-2:])}, lambda params, x: x + params["w"], "position"
)
MODELS = (
    Model(
        "MLP 784-512-512-10, batch 128",
        nn.serial(nn.dense(512), RELU, nn.dense(512), RELU, nn.dense(10)),
        mlp,
        jax.ShapeDtypeStruct((128, 784), jnp.float32),
        (128,),
        chunk=32,
        steps=128,
        auto_steps=2000,
    ),
    Model(
        "LeNet 28x28, batch 64",
        nn.serial(
            *(nn.conv(16, (5, 5)), RELU, nn.max_pool((2, 2)), nn.conv(32, (5, 5)), RELU, nn.max_pool((2, 2))),
            *(nn.flatten, nn.dense(128), RELU, nn.dense(10)),
        ),
        lenet,
        jax.ShapeDtypeStruct((64, 28, 28, 1), jnp.float32),
        (64,),
        chunk=8,
        steps=32,
    ),
    Model(
        "transformer 4 x 128, time 128, batch 16",
        nn.serial(
            nn.embedding(CHARACTERS, FEATURES), POSITION, *[BLOCK] * BLOCKS, nn.layer_norm(), nn.dense(CHARACTERS)
        ),
        transformer,
        jax.ShapeDtypeStruct((16, TIME), jnp.int32),
        (16, TIME),
        chunk=4,
        steps=8,
    ),
    Model(
        "LSTM 128, time 100, batch 32",
        nn.serial(nn.embedding(CHARACTERS, FEATURES), nn.lstm(FEATURES), nn.dense(CHARACTERS)),
        lstm,
        jax.ShapeDtypeStruct((32, 100), jnp.int32),
        (32, 100),
        chunk=8,
        steps=16,
    ),
)
