"""Layers and their composition.

A layer is a name and two pure functions, `init(key, x) -> (params, state)` and
`apply(params, state, x, *, key, train) -> (y, state)`. It runs under a named scope of its name. Inside another layer, the
name is also its key in params and state: the equations that use `params["dense_0"]["w"]` are in the scope `dense_0`.
Layers without params, or without state, have no entry there.
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
      name: the named scope of both, the note on errors raised in them, and the key in params and state.

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
        """The output y of a layer that has no state, needs no key, and is the same in training and evaluation.

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
    """`run` under a named scope. Errors raised in it get a note with the name."""
    if _is_ours(run) and "<locals>" in run.__qualname__:
        run.__qualname__ = f"{name}.{role}"  # for Python's error about a missing argument

    @wraps(run)
    def scoped(*args, **kwargs):
        try:
            if role == "init":
                _check_not_shape(args[1] if len(args) > 1 else kwargs.get("x"))
            with jax.named_scope(name):
                return run(*args, **kwargs)
        except Exception as error:
            error.add_note(f"  in      {name}")
            raise

    return scoped


def _is_ours(f) -> bool:
    return str(getattr(f, "__module__", "")).startswith(f"{__package__}.")


def _check_not_shape(x) -> None:
    if isinstance(x, tuple) and all(isinstance(size, int) for size in x):
        what = f"init needs an array, or its shape and dtype, and got the tuple {x}."
        raise ArgumentError(what, hint=f"jax.ShapeDtypeStruct({x}, jnp.float32)")


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
    """The composition of layers, the first one applied first. A plain function of x is a layer too.

    Layers that share a name are numbered: `dense_0`, `dense_1`. `apply` raises an ArgumentError if params hold a name that
    no layer has.

    >>> shift = stateless(lambda key, x: {"b": jnp.ones(())}, lambda params, x: x + params["b"], "shift")
    >>> model = serial(shift, jnp.tanh)
    >>> params, state = model.init(jax.random.key(0), jnp.zeros(2))
    >>> params, state
    ({'shift': {'b': Array(1., dtype=float32)}}, {})
    """
    return Layer(*_chain(_numbered(layers)), "serial")


def residual(*layers: Layer | Callable) -> Layer:
    """x + y, where y is the composition of the layers, applied to x.

    Raises:
      ArgumentError: from `apply`, if y does not have the shape and the dtype of x.

    Source: He et al. 2016, arXiv:1512.03385.

    >>> residual(jnp.tanh)({}, jnp.zeros(2))
    Array([0., 0.], dtype=float32)
    """
    init, apply_chain = _chain(_numbered(layers))

    def apply(params, state, x, *, key=None, train):
        y, state = apply_chain(params, state, x, key=key, train=train)
        _check_same_type("residual", x, y)
        return x + y, state

    return Layer(init, apply, "residual")


def repeat(layer: Layer, count: int) -> Layer:
    """The composition of `count` layers of one kind, as one scan over their stacked params and states.

    Each leaf of `params[layer.name]` has a leading axis of size count. The layer is traced and compiled once for any count.

    Raises:
      ArgumentError: from `apply`, if the layer does not keep the shape and the dtype of x.

    >>> deep = repeat(stateless(lambda key, x: {"b": jnp.ones(())}, lambda params, x: x + params["b"], "shift"), 5)
    >>> params, state = deep.init(jax.random.key(0), jnp.zeros(2))
    >>> params["shift"]["b"].shape, deep(params, jnp.zeros(2))
    ((5,), Array([5., 5.], dtype=float32))
    """
    layer = _as_layer(layer)
    init_one, apply_one = _chain({layer.name: layer})

    def init(key, x):
        return jax.vmap(lambda key: init_one(key, x))(jax.random.split(key, count))

    def apply(params, state, x, *, key=None, train):
        def step(x, slices):
            params, state, key = slices
            y, state = apply_one(params, state, x, key=key, train=train)
            _check_same_type("repeat", x, y)
            return y, state

        keys = None if key is None else jax.random.split(key, count)
        return lax.scan(step, x, (params, state, keys), length=count)

    return Layer(init, apply, "repeat")


def _chain(layers: dict[str, Layer]) -> tuple[Callable, Callable]:
    """`init` and `apply` of the composition of layers, each under its key."""
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
        if unknown := params.keys() - layers.keys():
            what = f"params hold {sorted(unknown)}, and the layers are {list(layers)}."
            raise ArgumentError(what, hint="pass the params that this layer's own init returned")
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        new_state = {}
        for (name, layer), key in zip(layers.items(), keys, strict=True):
            try:
                x, s = layer.apply(params.get(name, {}), state.get(name, {}), x, key=key, train=train)
            except KeyError:
                has_params = lambda: jax.tree.leaves(jax.eval_shape(layer.init, jax.random.key(0), x)[0])
                if name in params or not has_params():
                    raise
                what, hint = f"params hold nothing for the layer {name!r}.", "pass the params that init returned"
                raise ArgumentError(what, hint=hint) from None
            new_state |= _entry(name, s)
        return x, new_state

    return init, apply


def _entry(name, tree):
    return {name: tree} if jax.tree.leaves(tree) else {}


def _numbered(layers) -> dict[str, Layer]:
    """The layers by their names; names that several layers share get a number."""
    layers = list(map(_as_layer, layers))
    total, numbers = Counter(layer.name for layer in layers), Counter[str]()
    by_name = {}
    for layer in layers:
        name = layer.name if total[layer.name] == 1 else f"{layer.name}_{numbers[layer.name]}"
        if name in by_name:
            raise ArgumentError(f"two layers are named {name!r}.", hint="layer.named(...), with a name of its own")
        numbers[layer.name] += 1
        by_name[name] = layer
    return by_name


def _as_layer(f) -> Layer:
    if isinstance(f, Layer):
        return f
    if not callable(f):
        raise ArgumentError(f"{f!r} is neither a layer nor a function of x.", hint="nn.dense(64), or jnp.tanh")
    name = getattr(f, "__name__", type(f).__name__).strip("<>")
    if _is_ours(f) and getattr(f, "__annotations__", {}).get("return") == "Layer":
        required = [p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty]
        raise OptionError(f"nn.{name} was not called.", hint=f"nn.{name}({', '.join(required)})")
    return stateless(lambda key, x: {}, lambda params, x: f(x), name)


def _check_same_type(name, x, y):
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        what = f"{name} needs layers that keep the shape and the dtype of x."
        hint = "end with a layer of as many features as x has, and use params of its dtype"
        raise ArgumentError(what, inputs=f"x {type_text(x)}, y {type_text(y)}", hint=hint)


def check_axes(name: str, x, axes: str, features: int | None = None) -> None:
    """Raises an ArgumentError unless x has the named axes, as in "time, features", and `features` in the last."""
    if x.ndim < axes.count(",") + 1:
        move = f"move {name} before flatten, or " if "width" in axes else ""
        what, hint = f"{name} needs x of shape [..., {axes}].", "add an axis of size 1, as in x[None] or x[..., None]"
        raise ArgumentError(what, inputs=f"x {type_text(x)}", hint=f"{move}{hint}")
    if features is not None and x.shape[-1] != features:
        what = f"{name} has params for {features} features, and x has {x.shape[-1]}."
        raise ArgumentError(what, inputs=f"x {type_text(x)}", hint="init again with this x, or change the layer before")


def check_divides(name: str, count: int, parts: str, x, axis: str) -> None:
    """Raises an ArgumentError unless the number of `parts`, as heads or groups, divides the last axis of x."""
    if x.shape[-1] % count:
        what = f"{name} has {count} {parts}, and x has {x.shape[-1]} {axis}."
        raise ArgumentError(what, inputs=f"x {type_text(x)}", hint=f"{parts} that divide the {axis}")


def type_text(x) -> str:
    """`float32[8,3]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def float_dtype(x) -> jnp.dtype:
    """The dtype of params for x: that of x, or float32 if x holds integers or bools."""
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype("float32")


def wide_dtype(dtype) -> jnp.dtype:
    """The dtype in which sums of a float dtype accumulate: float64 for float64, else float32."""
    return jnp.dtype("float64" if dtype == jnp.float64 else "float32")
