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

from ..transforms.core.errors import OptionError
from .layer import Layer, check_axes, check_divides, stateless
from .linear import weight_and_bias

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
    """Convolution without the flip (cross-correlation): float[..., *space, c] to float[..., *space', features].

    Args:
      features: channels of the output.
      window: size per spatial dimension, 1 to 3 of them.
      stride: step of the window, one for all dimensions or one each.
      padding: "SAME", "VALID", or (before, after) per dimension.
      dilation: step between the points of the window.
      groups: number of groups of channels; each group is convolved separately.
      w: initialiser of `w`, float[*window, c / groups, features].
      b: initialiser of `b`, float[features]; None for no bias.
    Raises:
      OptionError: `window` is not a sequence of 1 to 3 sizes, or another option does not have one value per dimension.
      ArgumentError: x has too few axes, its channels differ from those of `w`, or are not a multiple of `groups`.

    >>> layer = conv(8, (3, 3))
    >>> x = jnp.ones((2, 28, 28, 1))
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> layer(params, x).shape
    (2, 28, 28, 8)
    """
    window = _window("conv", window)
    steps = {"window_strides": _per_dimension("conv", "stride", stride, window)}
    steps["rhs_dilation"] = _per_dimension("conv", "dilation", dilation, window)
    convolve = _convolution("DHW"[-len(window) :], padding=padding, feature_group_count=groups, **steps)

    def init(key, x):
        check_axes("conv", x, _axes(window))
        check_divides("conv", groups, "groups", x, "channels")
        return weight_and_bias(key, x, (*window, x.shape[-1] // groups, features), w, b)

    def call(params, x):
        check_axes("conv", x, _axes(window), params["w"].shape[-2] * groups)
        y = convolve(_one_batch_axis(x, window), params["w"])
        y = y if b is None else y + params["b"]
        return y.reshape(*x.shape[: -len(window) - 1], *y.shape[1:])

    return stateless(init, call, "conv")


def max_pool(window: Sequence[int], *, stride: int | Sequence[int] | None = None, padding: Padding = "VALID") -> Layer:
    """The maximum in each window: [..., *space, c] to [..., *space', c].

    The gradient of a maximum that several values attain is split evenly among them if `stride` equals the window, so that
    the windows tile space (much faster on CPUs). If windows overlap or leave gaps, the first of the values gets all of it.

    Args:
      window: size per spatial dimension, 1 to 3 of them.
      stride: step of the window, one for all dimensions or one each; None for the window itself.
      padding: "SAME", "VALID", or (before, after) per dimension. Padding is never the maximum.
    Raises:
      OptionError: `window` is not a sequence of 1 to 3 sizes, or `stride` does not have one value per dimension.
      ArgumentError: x has too few axes.

    >>> max_pool((2,))({}, jnp.array([[1.0], [3.0], [2.0], [0.0]]))
    Array([[3.],
           [2.]], dtype=float32)
    """

    def pool(x, window, stride):
        lowest = -math.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
        return _reduce_windows(x, window, stride, padding, jnp.max, lax.max, lowest)

    return _pooling("max_pool", window, stride, pool)


def avg_pool(window: Sequence[int], *, stride: int | Sequence[int] | None = None, padding: Padding = "VALID") -> Layer:
    """The mean in each window, padding excluded: [..., *space, c] to [..., *space', c].

    Arguments and errors are those of `max_pool`.

    >>> avg_pool((2,))({}, jnp.array([[1.0], [3.0], [2.0], [0.0]]))
    Array([[2.],
           [1.]], dtype=float32)
    """

    def pool(x, window, stride):
        ones = jnp.ones((*x.shape[-len(window) - 1 : -1], 1), x.dtype)
        total, count = (_reduce_windows(a, window, stride, padding, jnp.sum, lax.add, 0) for a in (x, ones))
        return total / count

    return _pooling("avg_pool", window, stride, pool)


def flatten(x):
    """All axes after the first as one: [n, ...] to [n, m]. A plain function, so a layer too.

    >>> flatten(jnp.ones((2, 3, 4))).shape
    (2, 12)
    """
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _convolution(space: str, **options) -> Callable:
    """`convolve(x, w)`, n...c with ...io, whose gradients are as fast on CPU inside a scan as outside.

    Reverse mode transposes both products of dy = dx ∗ w + x ∗ dw and their axis orders. On CPU, XLA is fast for n...c with
    ...io only, and does not change other orders inside a scan. So each product has the order whose transpose is n...c with
    ...io. On other platforms the gradients are JAX's own.
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


def _pooling(name: str, window, stride, pool: Callable) -> Layer:
    """The layer of `pool(x, window, stride)`."""
    window = _window(name, window)
    stride = window if stride is None else _per_dimension(name, "stride", stride, window)

    def call(params, x):
        check_axes(name, x, _axes(window))
        return pool(x, window, stride)

    return stateless(lambda key, x: {}, call, name)


def _reduce_windows(x, window, stride, padding, reduce, pairwise, neutral):
    """`reduce` in each window; `pairwise` and `neutral` are the same reduction for lax.reduce_window."""
    y, neutral = _one_batch_axis(x, window), np.array(neutral, x.dtype)
    sizes, steps = (1, *window, 1), (1, *stride, 1)
    has_pads = not isinstance(padding, str)
    pads = [(0, 0), *padding, (0, 0)] if has_pads else lax.padtype_to_pads(y.shape, sizes, steps, padding)
    if sizes == steps:
        surplus = [(n + sum(pad)) % size for n, pad, size in zip(y.shape, pads, sizes, strict=True)]
        edges = [(low, high - n, 0) for (low, high), n in zip(pads, surplus, strict=True)]
        y = lax.pad(y, neutral, edges) if any(map(any, edges)) else y
        tiles = [part for n, size in zip(y.shape[1:-1], window, strict=True) for part in (n // size, size)]
        y = reduce(y.reshape(len(y), *tiles, y.shape[-1]), axis=tuple(range(2, 2 * len(window) + 1, 2)))
    else:
        y = lax.reduce_window(y, neutral, pairwise, sizes, steps, pads)
    return y.reshape(*x.shape[: -len(window) - 1], *y.shape[1:])


def _one_batch_axis(x, window):
    return x.reshape(math.prod(x.shape[: -len(window) - 1]), *x.shape[-len(window) - 1 :])


def _axes(window):
    return ", ".join((*AXES[-len(window) :], "channels"))


def _window(name, window) -> tuple[int, ...]:
    if not isinstance(window, Sequence) or not 1 <= len(window) <= 3:
        size, features = window if isinstance(window, int) else 2, "features, " if name == "conv" else ""
        hint = f"nn.{name}({features}({size}, {size}))"
        raise OptionError(f"{name} needs a window of 1 to 3 sizes, and got {window!r}.", hint=hint)
    return tuple(window)


def _per_dimension(name, option, value, window) -> tuple[int, ...]:
    values = (value,) * len(window) if isinstance(value, int) else tuple(value)
    if len(values) != len(window):
        what = f"{name} has the window {window}, and {option}={value}."
        raise OptionError(what, hint="one number, or one per dimension")
    return values
