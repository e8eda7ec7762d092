"""Convolution and pooling in 1 to 3 dimensions, channels last: [..., width, c], [..., height, width, c] and so on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.nn.initializers import Initializer, lecun_normal, zeros

from ..transforms.core.errors import ArgumentError, OptionError
from .layer import Layer, check, float_dtype, shown, stateless

AXES = ("depth", "height", "width")
Padding = str | Sequence[tuple[int, int]]


def conv(
    features: int,
    window: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    w: Initializer = lecun_normal(),
    b: Initializer | None = zeros,
) -> Layer:
    """Convolution, without the flip: float[..., *space, c] to float[..., *space', features].

    Args:
      features: channels of the output.
      window: size per dimension of space, 1 to 3 of them.
      stride: step of the window, one for all dimensions or one each.
      padding: "SAME", "VALID", or (before, after) per dimension.
      dilation: step between the points of the window.
      groups: channels are cut into as many groups, each convolved on its own.
      w: initialiser of `w`, float[*window, c / groups, features].
      b: initialiser of `b`, float[features]; None for no bias.
    Raises:
      OptionError: `window` is not a sequence of 1 to 3 sizes, or another option is not one per dimension.
      ArgumentError: x has too few axes, its channels are not those of `w`, or not a multiple of `groups`.

    >>> layer = conv(8, (3, 3))
    >>> x = jnp.ones((2, 28, 28, 1))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).shape
    (2, 28, 28, 8)
    """
    window = _window("conv", window)
    stride, dilation = _each("conv", "stride", stride, window), _each("conv", "dilation", dilation, window)
    convolve = _convolution(
        "DHW"[-len(window) :],
        window_strides=stride,
        padding=padding,
        rhs_dilation=dilation,
        feature_group_count=groups,
    )

    def init(key, x):
        check("conv", x, _axes(window))
        if x.shape[-1] % groups:
            raise ArgumentError(
                f"conv has {groups} groups, and x has {x.shape[-1]} channels.",
                inputs=f"x {shown(x)}",
                hint="groups that divide the channels",
            )
        dtype, keys = float_dtype(x), jax.random.split(key)
        params = {"w": w(keys[0], (*window, x.shape[-1] // groups, features), dtype)}
        return params if b is None else params | {"b": b(keys[1], (features,), dtype)}

    def call(params, x):
        check("conv", x, _axes(window), params["w"].shape[-2] * groups)
        y = convolve(_one_batch_axis(x, window), params["w"])
        y = y if b is None else y + params["b"]
        return y.reshape(*x.shape[: -len(window) - 1], *y.shape[1:])

    return stateless(init, call, "conv")


def max_pool(window: Sequence[int], *, stride: int | Sequence[int] | None = None, padding: Padding = "VALID") -> Layer:
    """The maximum in each window: [..., *space, c] to [..., *space', c].

    Where several values are the maximum, its gradient is shared evenly among them if stride is the window, so that the
    windows tile space (the fastest by far on CPUs). If they overlap or leave gaps, all of it goes to the first.

    Args:
      window: size per dimension of space, 1 to 3 of them.
      stride: step of the window, one for all dimensions or one each; None for the window itself.
      padding: "SAME", "VALID", or (before, after) per dimension. What is padded is never the maximum.
    Raises:
      OptionError: `window` is not a sequence of 1 to 3 sizes, or `stride` is not one per dimension.
      ArgumentError: x has too few axes.

    >>> max_pool((2,))({}, jnp.array([[1.0], [3.0], [2.0], [0.0]]))
    Array([[3.],
           [2.]], dtype=float32)
    """
    window = _window("max_pool", window)
    stride = window if stride is None else _each("max_pool", "stride", stride, window)

    def call(params, x):
        check("max_pool", x, _axes(window))
        lowest = -math.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
        return _pool(x, window, stride, padding, jnp.max, lax.max, lowest)

    return stateless(lambda key, x: {}, call, "max_pool")


def avg_pool(window: Sequence[int], *, stride: int | Sequence[int] | None = None, padding: Padding = "VALID") -> Layer:
    """The mean in each window, of what is not padding: [..., *space, c] to [..., *space', c].

    Arguments and errors are those of `max_pool`.

    >>> avg_pool((2,))({}, jnp.array([[1.0], [3.0], [2.0], [0.0]]))
    Array([[2.],
           [1.]], dtype=float32)
    """
    window = _window("avg_pool", window)
    stride = window if stride is None else _each("avg_pool", "stride", stride, window)

    def call(params, x):
        check("avg_pool", x, _axes(window))
        ones = jnp.ones((*x.shape[-len(window) - 1 : -1], 1), x.dtype)
        total, count = (_pool(a, window, stride, padding, jnp.sum, lax.add, 0) for a in (x, ones))
        return total / count

    return stateless(lambda key, x: {}, call, "avg_pool")


def flatten(x):
    """All axes after the first as one: [n, ...] to [n, m]. A plain function, and so a layer.

    >>> flatten(jnp.ones((2, 3, 4))).shape
    (2, 12)
    """
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _convolution(space: str, **options) -> Callable:
    """`convolve(x, w)`, n...c with ...io, whose gradients XLA:CPU runs as fast inside a scan as outside.

    Reverse mode transposes both products of dy = dx ∗ w + x ∗ dw, and with them their orders of axes. XLA:CPU is fast
    at n...c with ...io only, and inside a scan it leaves other orders as they are. So each product is written in the
    order whose transpose is that one. On other platforms the gradients are JAX's own.
    """

    def product(x, w, *labels):
        return lax.conv_general_dilated(x, w, dimension_numbers=labels, **options)

    def plain(x, w):
        return product(x, w, f"N{space}C", f"{space}IO", f"N{space}C")

    def jvp(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        terms = []
        if not isinstance(dx, SymbolicZero):
            terms.append(product(dx, jnp.swapaxes(w, -1, -2), f"N{space}C", f"{space}OI", f"N{space}C"))
        if not isinstance(dw, SymbolicZero):
            dy = product(jnp.swapaxes(x, 0, -1), jnp.moveaxis(dw, -2, 0), f"C{space}N", f"I{space}O", f"{space}NC")
            terms.append(jnp.moveaxis(dy, -2, 0))
        return canonical(x, w), functools.reduce(jnp.add, terms)

    canonical = jax.custom_jvp(plain)
    canonical.defjvp(jvp, symbolic_zeros=True)
    return lambda x, w: (canonical if jax.default_backend() == "cpu" else plain)(x, w)


def _pool(x, window, stride, padding, reduce, pairwise, neutral):
    """`reduce` in each window; `pairwise` and `neutral` are the same reduction as lax.reduce_window has it."""
    y, neutral = _one_batch_axis(x, window), np.array(neutral, x.dtype)
    whole, stride = (1, *window, 1), (1, *stride, 1)
    named = isinstance(padding, str)
    pads = lax.padtype_to_pads(y.shape, whole, stride, padding) if named else [(0, 0), *padding, (0, 0)]
    if whole == stride:
        rests = [(size + sum(pad)) % step for size, pad, step in zip(y.shape, pads, whole, strict=True)]
        edges = [(low, high - rest, 0) for (low, high), rest in zip(pads, rests, strict=True)]
        y = lax.pad(y, neutral, edges) if any(map(any, edges)) else y
        tiles = [part for size, step in zip(y.shape[1:-1], window, strict=True) for part in (size // step, step)]
        y = reduce(y.reshape(len(y), *tiles, y.shape[-1]), axis=tuple(range(2, 2 * len(window) + 1, 2)))
    else:
        y = lax.reduce_window(y, neutral, pairwise, whole, stride, pads)
    return y.reshape(*x.shape[: -len(window) - 1], *y.shape[1:])


def _one_batch_axis(x, window):
    return x.reshape(math.prod(x.shape[: -len(window) - 1]), *x.shape[-len(window) - 1 :])


def _axes(window):
    return ", ".join((*AXES[-len(window) :], "channels"))


def _window(name, window) -> tuple[int, ...]:
    if not isinstance(window, Sequence) or not 1 <= len(window) <= 3:
        size, before = window if isinstance(window, int) else 2, "features, " if name == "conv" else ""
        hint = f"nn.{name}({before}({size}, {size}))"
        raise OptionError(f"{name} needs a window of 1 to 3 sizes, and got {window!r}.", hint=hint)
    return tuple(window)


def _each(name, option, value, window) -> tuple[int, ...]:
    values = (value,) * len(window) if isinstance(value, int) else tuple(value)
    if len(values) != len(window):
        raise OptionError(
            f"{name} has the window {window}, and {option}={value}.", hint="one number, or one per dimension"
        )
    return values
