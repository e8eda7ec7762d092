"""Layers, and the ways to put them together.

A layer is a name and two pure functions, `init(key, x) -> (params, state)` and
`apply(params, state, x, *, key, train) -> (y, state)`. It runs under the named scope of its name, and inside another
layer the name is also its key in params and state: what uses `params["dense_0"]["w"]` lies in the scope `dense_0`. A
layer without params, or without state, has no entry there.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..transforms.core.errors import ArgumentError, OptionError


@dataclass(frozen=True)
class Layer:
    """Two pure functions and a name.

    Attributes:
      init: `init(key, x) -> (params, state)`, two trees; x is an array, or a jax.ShapeDtypeStruct.
      apply: `apply(params, state, x, *, key=None, train) -> (y, state)`; train is a Python bool.
      name: the named scope that both run under, the note on an error raised in them, and the key in params and state.

    >>> double = Layer(lambda key, x: ({}, {}), lambda params, state, x, *, key=None, train: (2 * x, {}), "double")
    >>> double({}, 3.0)
    6.0
    """

    init: Callable[..., tuple[Any, Any]] = field(repr=False)
    apply: Callable[..., tuple[Any, Any]] = field(repr=False)
    name: str

    def __post_init__(self):
        object.__setattr__(self, "init", _scoped(self.init, self.name, "init"))
        object.__setattr__(self, "apply", _scoped(self.apply, self.name, "apply"))

    def __call__(self, params, x):
        """The output y of a layer that has no state and needs no key, where training and evaluation are one.

        Raises:
          ArgumentError: the layer, or one inside it, has state, or needs a key in training.
        """
        y, _ = self.apply(params, {}, x, key=None, train=True)
        return y

    def named(self, name: str) -> Layer:
        """The same layer under another name.

        >>> stateless(lambda key, x: {}, lambda params, x: x, "same").named("input")
        Layer(name='input')
        """
        return Layer(self.init.__wrapped__, self.apply.__wrapped__, name)  # type: ignore[attr-defined]


def _scoped(run: Callable, name: str, role: str) -> Callable:
    """`run` under a named scope, which an error raised in it is noted with."""
    if _is_ours(run) and "<locals>" in run.__qualname__:
        run.__qualname__ = f"{name}.{role}"  # Python says it where an argument is missing

    @wraps(run)
    def scoped(*args, **kwargs):
        try:
            if role == "init":
                _check_no_shape(args[1] if len(args) > 1 else kwargs.get("x"))
            with jax.named_scope(name):
                return run(*args, **kwargs)
        except Exception as error:
            error.add_note(f"  in      {name}")
            raise

    return scoped


def _is_ours(f) -> bool:
    return str(getattr(f, "__module__", "")).startswith(f"{__package__}.")


def _check_no_shape(x) -> None:
    if isinstance(x, tuple) and all(isinstance(size, int) for size in x):
        raise ArgumentError(
            f"init needs an array, or its shape and dtype, and got the tuple {x}.",
            hint=f"jax.ShapeDtypeStruct({x}, jnp.float32)",
        )


def stateless(init: Callable, call: Callable, name: str) -> Layer:
    """The layer of `init(key, x) -> params` and `call(params, x) -> y`: no state, no key.

    >>> scale = stateless(lambda key, x: {"w": jnp.ones(x.shape[-1])}, lambda params, x: params["w"] * x, "scale")
    >>> params, state = scale.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> scale(params, jnp.ones((2, 3))).shape
    (2, 3)
    """

    def apply(params, state, x, *, key=None, train):
        return call(params, x), {}

    return Layer(lambda key, x: (init(key, x), {}), apply, name)


def serial(*layers: Layer | Callable) -> Layer:
    """One layer after another. A plain function of x is a layer too.

    A name that comes once is kept; of a name that comes often, each is counted: `dense_0`, `dense_1`.
    Its `apply` raises an ArgumentError where params hold a name that is no layer's.

    >>> shift = stateless(lambda key, x: {"b": jnp.ones(())}, lambda params, x: x + params["b"], "shift")
    >>> model = serial(shift, jnp.tanh)
    >>> params, state = model.init(jax.random.key(0), jnp.zeros(2))
    >>> params, state
    ({'shift': {'b': Array(1., dtype=float32)}}, {})
    """
    return Layer(*_chain(_counted(layers)), "serial")


def residual(*layers: Layer | Callable) -> Layer:
    """x + y, where y is what the layers, one after another, make of x.

    Raises:
      ArgumentError: from `apply`, where y has not the shape and the dtype of x.

    Source: He et al. 2016, arXiv:1512.03385.

    >>> residual(jnp.tanh)({}, jnp.zeros(2))
    Array([0., 0.], dtype=float32)
    """
    init, run = _chain(_counted(layers))

    def apply(params, state, x, *, key=None, train):
        y, state = run(params, state, x, key=key, train=train)
        _check_kept("residual", x, y)
        return x + y, state

    return Layer(init, apply, "residual")


def repeat(layer: Layer, count: int) -> Layer:
    """`count` layers of one kind, one after another, as one scan over their stacked params and states.

    Each leaf of `params[layer.name]` has a leading axis of size count. The layer is traced and compiled once, whatever
    the count is.

    Raises:
      ArgumentError: from `apply`, where the layer does not keep the shape and the dtype of x.

    >>> deep = repeat(stateless(lambda key, x: {"b": jnp.ones(())}, lambda params, x: x + params["b"], "shift"), 5)
    >>> params, state = deep.init(jax.random.key(0), jnp.zeros(2))
    >>> params["shift"]["b"].shape, deep(params, jnp.zeros(2))
    ((5,), Array([5., 5.], dtype=float32))
    """
    layer = _layer(layer)
    init_one, run = _chain({layer.name: layer})

    def init(key, x):
        return jax.vmap(lambda key: init_one(key, x))(jax.random.split(key, count))

    def apply(params, state, x, *, key=None, train):
        def step(x, each):
            params, state, key = each
            y, state = run(params, state, x, key=key, train=train)
            _check_kept("repeat", x, y)
            return y, state

        keys = None if key is None else jax.random.split(key, count)
        return lax.scan(step, x, (params, state, keys), length=count)

    return Layer(init, apply, "repeat")


def _chain(layers: dict[str, Layer]) -> tuple[Callable, Callable]:
    """`init` and `apply` of the layers, one after another, each under its key."""
    layers = {name: layer.named(name) for name, layer in layers.items()}

    def init(key, x):
        params, state = {}, {}
        keys = jax.random.split(key, len(layers))
        for (name, layer), key in zip(layers.items(), keys, strict=True):
            p, s = layer.init(key, x)
            x, _ = jax.eval_shape(partial(layer.apply, train=False), p, s, x)
            params |= _entry(name, p)
            state |= _entry(name, s)
        return params, state

    def apply(params, state, x, *, key=None, train):
        if strangers := params.keys() - layers.keys():
            raise ArgumentError(
                f"params hold {sorted(strangers)}, and the layers are {list(layers)}.",
                hint="pass the params that this layer's own init returned",
            )
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        after = {}
        for (name, layer), key in zip(layers.items(), keys, strict=True):
            try:
                x, s = layer.apply(params.get(name, {}), state.get(name, {}), x, key=key, train=train)
            except KeyError:
                if name in params or not _has_params(layer, x):
                    raise
                what, hint = f"params hold nothing for the layer {name!r}.", "pass the params that init returned"
                raise ArgumentError(what, hint=hint) from None
            after |= _entry(name, s)
        return x, after

    return init, apply


def _has_params(layer, x) -> bool:
    params, _ = jax.eval_shape(layer.init, jax.random.key(0), x)
    return bool(jax.tree.leaves(params))


def _entry(name, tree):
    return {name: tree} if jax.tree.leaves(tree) else {}


def _counted(layers) -> dict[str, Layer]:
    layers = [_layer(layer) for layer in layers]
    total, seen = Counter(layer.name for layer in layers), Counter[str]()
    named = {}
    for layer in layers:
        name = layer.name if total[layer.name] == 1 else f"{layer.name}_{seen[layer.name]}"
        if name in named:
            raise ArgumentError(f"two layers are named {name!r}.", hint="layer.named(...), with a name of its own")
        seen[layer.name] += 1
        named[name] = layer
    return named


def _layer(f) -> Layer:
    if isinstance(f, Layer):
        return f
    if not callable(f):
        raise ArgumentError(f"{f!r} is neither a layer nor a function of x.", hint="nn.dense(64), or jnp.tanh")
    name = getattr(f, "__name__", type(f).__name__).strip("<>")
    if _is_ours(f) and getattr(f, "__annotations__", {}).get("return") == "Layer":
        needed = [p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty]
        raise OptionError(f"nn.{name} was not called.", hint=f"nn.{name}({', '.join(needed)})")
    return stateless(lambda key, x: {}, lambda params, x: f(x), name)


def _check_kept(name, x, y):
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        raise ArgumentError(
            f"{name} needs layers that keep the shape and the dtype of x.",
            inputs=f"x {shown(x)}, y {shown(y)}",
            hint="end with a layer of as many features as x has, and use params of its dtype",
        )


def check(name: str, x, axes: str, features: int | None = None) -> None:
    """Raises an ArgumentError unless x has the named axes, as in "time, features", and `features` in the last."""
    least = axes.count(",") + 1
    if x.ndim < least:
        move = f"move {name} before flatten, or " if "width" in axes else ""
        raise ArgumentError(
            f"{name} needs x of shape [..., {axes}].",
            inputs=f"x {shown(x)}",
            hint=f"{move}add an axis of size 1, as in x[None] or x[..., None]",
        )
    if features is not None and x.shape[-1] != features:
        raise ArgumentError(
            f"{name} has params for {features} features, and x has {x.shape[-1]}.",
            inputs=f"x {shown(x)}",
            hint="init again with this x, or change the layer before",
        )


def shown(x) -> str:
    """`float32[8,3]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def float_dtype(x) -> jnp.dtype:
    """The dtype of params for x: its own, or float32 where x holds integers or bools."""
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype("float32")


def wide_dtype(dtype) -> jnp.dtype:
    """What a float dtype accumulates in: float64 for itself, float32 for itself and those below."""
    return jnp.dtype("float64" if dtype == jnp.float64 else "float32")
