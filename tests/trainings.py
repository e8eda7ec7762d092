"""Twenty-four programs that need memory: six models, each forward, and its gradient kept or computed again in three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Wrap = Callable[[Callable], Callable]  # of a layer, `layer(params, x)`


def products(primitive, *args, **params) -> bool:
    """A policy: what products with weights and convolutions make is kept."""
    keeps = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return keeps or primitive is lax.conv_general_dilated_p


def chained(wrap: Wrap, layer: Callable, params: Sequence[Any], x: jax.Array, segment: int) -> jax.Array:
    """Layers one after the other, wrapped in segments of so many."""

    def some(params, x):
        for p in params:
            x = layer(p, x)
        return x

    for k in range(0, len(params), segment):
        x = wrap(some)(params[k : k + segment], x)
    return x


def scanned(wrap: Wrap, step: Callable, params: Any, carry: Any, xs: Any, segment: int) -> tuple[Any, Any]:
    """`lax.scan` of `step(params, carry, x)`, wrapped in segments of so many steps."""
    if segment == 1:
        return lax.scan(lambda carry, x: wrap(step)(params, carry, x), carry, xs)
    cut = jax.tree.map(lambda x: x.reshape(-1, segment, *x.shape[1:]), xs)
    some = wrap(lambda params, carry, xs: lax.scan(partial(step, params), carry, xs))
    carry, ys = lax.scan(partial(some, params), carry, cut)
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def mlp(wrap: Wrap, depth=16, width=512, batch=1024, segment=1):
    layer = lambda p, x: jax.nn.gelu(x @ p["w"] + p["b"])

    def loss(params, x, y):
        return jnp.mean((chained(wrap, layer, params, x, segment) - y) ** 2)

    params = [{"w": array(width, width), "b": array(width)} for _ in range(depth)]
    return loss, (params, array(batch, width), array(batch, width))


def norm(p, x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(heads: int, p, x):
    """Of a transformer, the norms before."""
    batch, time, width = x.shape
    y = norm(p["norm_0"], x) @ p["qkv"]
    q, k, v = (part.reshape(batch, time, heads, -1) for part in jnp.split(y, 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -1e9)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
    x = x + y @ p["out"]
    return x + jax.nn.gelu(norm(p["norm_1"], x) @ p["up"] + p["up_b"]) @ p["down"] + p["down_b"]


def block_params(width: int, *stack: int):
    d, a = width, partial(array, *stack)
    norms = {f"norm_{k}": {"scale": a(d), "bias": a(d)} for k in range(2)}
    weights = {"qkv": a(d, 3 * d), "out": a(d, d), "up": a(d, 4 * d), "up_b": a(4 * d)}
    return norms | weights | {"down": a(4 * d, d), "down_b": a(d)}


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


def transformer(wrap: Wrap, depth=4, width=256, heads=4, time=256, batch=8, characters=256, segment=1):
    def loss(params, x, y):
        x = chained(wrap, partial(block, heads), params["blocks"], params["embedding"][x], segment)
        return cross_entropy(x @ params["head"], y)

    params = {"embedding": array(characters, width), "head": array(width, characters)}
    params["blocks"] = [block_params(width) for _ in range(depth)]
    text = array(batch, time, dtype=jnp.int32)
    return loss, (params, text, text)


def gpt(wrap: Wrap, depth=6, width=128, heads=4, time=128, batch=16, characters=256, segment=1):
    step = lambda _, x, p: (block(heads, p, x), None)

    def loss(params, x, y):
        x = params["embedding"][x] + params["position"]
        x, _ = scanned(wrap, step, None, x, params["blocks"], segment)
        return cross_entropy(norm(params["norm"], x) @ params["embedding"].T, y)

    params = {"embedding": array(characters, width), "position": array(time, width)}
    params |= {"blocks": block_params(width, depth), "norm": {"scale": array(width), "bias": array(width)}}
    text = array(batch, time, dtype=jnp.int32)
    return loss, (params, text, text)


def lstm(wrap: Wrap, time=200, width=256, batch=64, classes=10, segment=1):
    def cell(p, carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["w_x"] + h @ p["w_h"] + p["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def loss(params, xs, y):
        zeros = jnp.zeros((batch, width))
        _, hs = scanned(wrap, cell, params, (zeros, zeros), xs, segment)
        return cross_entropy(hs[-1] @ params["head"], y)

    params = {"w_x": array(width, 4 * width), "w_h": array(width, 4 * width), "b": array(4 * width)}
    params["head"] = array(width, classes)
    return loss, (params, array(time, batch, width), array(batch, dtype=jnp.int32))


def conv(w, x, stride=1):
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(p, x):
    mean = x.mean((0, 1, 2))
    return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean((0, 1, 2)) + 1e-5) * p["scale"] + p["bias"]


def resnet(wrap: Wrap, depth=8, channels=32, size=32, batch=32, classes=10, segment=1):
    def layer(p, x):
        y = jax.nn.relu(batch_norm(p["norm_0"], conv(p["conv_0"], x)))
        return jax.nn.relu(x + batch_norm(p["norm_1"], conv(p["conv_1"], y)))

    def loss(params, x, y):
        x = chained(wrap, layer, params["blocks"], conv(params["stem"], x), segment)
        return cross_entropy(x.mean((1, 2)) @ params["head"], y)

    each = {f"conv_{k}": array(3, 3, channels, channels) for k in range(2)}
    each |= {f"norm_{k}": {"scale": array(channels), "bias": array(channels)} for k in range(2)}
    params = {"stem": array(3, 3, 3, channels), "blocks": [each] * depth, "head": array(channels, classes)}
    return loss, (params, array(batch, size, size, 3), array(batch, dtype=jnp.int32))


def unet(wrap: Wrap, levels=3, channels=16, size=64, batch=8):
    @wrap
    def double(p, x):
        return jax.nn.relu(conv(p["b"], jax.nn.relu(conv(p["a"], x))))

    def halved(x):
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))

    def loss(params, x, y):
        skips = []
        for p in params["down"]:
            x = double(p, x)
            skips.append(x)
            x = halved(x)
        x = double(params["middle"], x)
        for p, skip in zip(params["up"], reversed(skips), strict=True):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = double(p, jnp.concatenate([x, skip], axis=-1))
        return jnp.mean((conv(params["head"], x) - y) ** 2)

    pair = lambda i, o: {"a": array(3, 3, i, o), "b": array(3, 3, o, o)}
    c = [channels * 2**k for k in range(levels + 1)]
    params = {"down": [pair(i, o) for i, o in zip([3, *c[:-2]], c[:-1], strict=True)], "middle": pair(c[-2], c[-1])}
    params["up"] = [pair(low + high, high) for high, low in zip(c[-2::-1], c[:0:-1], strict=True)]
    params["head"] = array(1, 1, channels, 3)
    image = array(batch, size, size, 3)
    return loss, (params, image, image)


class Training(NamedTuple):
    """A program and its arguments, which are shapes."""

    name: str
    f: Callable
    args: tuple

    def __str__(self) -> str:
        return self.name


def trainings(**sizes: dict[str, int]) -> Iterator[Training]:
    """The models, in other sizes if they are given by name, and their gradients."""
    ways: dict[str, Wrap] = {
        "gradient": lambda layer: layer,
        "remat": jax.checkpoint,
        "products": partial(jax.checkpoint, policy=products),
    }
    for model in (mlp, transformer, resnet, lstm, gpt, unet):
        make = partial(model, **sizes.get(model.__name__, {}))
        yield Training(f"{model.__name__} forward", *make(lambda layer: layer))
        for way, wrap in ways.items():
            loss, args = make(wrap)
            yield Training(f"{model.__name__} {way}", jax.value_and_grad(loss), args)
