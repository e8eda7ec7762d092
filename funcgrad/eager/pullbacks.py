"""The derivative of one recorded operation: the inputs and outputs that are active, and its pullback, compiled once per kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from ..transforms.autodiff.grad import vjp
from ..transforms.core import _jax, subjaxprs


class Operation(NamedTuple):
    """A primitive with its parameters, as a function of its operands that returns a list."""

    primitive: Any
    params: dict[str, Any]

    def __call__(self, *values: Any) -> list[Any]:
        """The outputs, under the current trace."""
        outputs = self.primitive.bind(*values, **self.params)
        return list(outputs) if self.primitive.multiple_results else [outputs]


def activity(f: Any, inputs: Sequence[Any], wrt: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The active ones among the inputs `wrt` of `f`, an Operation or another function, and the active outputs.

    Derivatives that are zero for all values, as that of floor, make nothing active.
    """
    avals = tuple(map(jax.typeof, inputs))
    if isinstance(f, Operation) and f.primitive in _plain_primitives():
        with suppress(TypeError):  # parameters without a hash
            return _operation_activity(f.primitive, tuple(f.params.items()), avals, wrt)
    return wrt, _active_outputs(_jax.stage_flat(f, avals, _jax.no_names), wrt)


def pull_back(f: Any, inputs: Sequence[Any], wrt: tuple[int, ...], cotangents: Sequence[Any]) -> list[Any]:
    """The cotangents of the inputs `wrt` of `f`, from those of its outputs; None stands for zero."""
    if not isinstance(f, Operation):
        return _vjp(f, wrt, inputs, cotangents)
    compile_cached = _compiled_operation if f.primitive in _plain_primitives() else _compiled_program
    kind = f.primitive, tuple(f.params.items()), wrt
    try:
        compiled = compile_cached(*kind)
    except TypeError:  # parameters without a hash
        compiled = _compiled(*kind)
    return compiled(inputs, cotangents)


def is_float(x: Any) -> bool:
    """Whether a value has real or complex elements."""
    return jax.dtypes.issubdtype(getattr(jax.typeof(x), "dtype", bool), np.inexact)


@functools.lru_cache(maxsize=4096)
def _operation_activity(primitive: Any, params: tuple, avals: tuple, wrt: tuple[int, ...]) -> Any:
    operation: Any = Operation(primitive, dict(params))
    jaxpr = _jax.stage_flat(operation, avals, _jax.no_names)
    return tuple(k for k in wrt if _active_outputs(jaxpr, (k,))), _active_outputs(jaxpr, wrt)


def _active_outputs(jaxpr: Any, wrt: tuple[int, ...]) -> tuple[int, ...]:
    """The outputs that have tangents if the inputs `wrt` have."""
    _, has_tangent = _jax.jvp_of(jaxpr, [k in wrt for k in range(len(jaxpr.in_avals))], False)
    return tuple(k for k, is_active in enumerate(has_tangent) if is_active)


def _compiled(primitive: Any, params: tuple, wrt: tuple[int, ...]) -> Callable:
    return jax.jit(functools.partial(_vjp, Operation(primitive, dict(params)), wrt))


# Parameters of JAX's plain primitives refer to no user objects; bodies of loops and callbacks do, so few of those are cached.
_compiled_operation = functools.lru_cache(maxsize=4096)(_compiled)
_compiled_program = functools.lru_cache(maxsize=64)(_compiled)


@functools.cache
def _plain_primitives() -> frozenset[Any]:
    """JAX's own primitives without sub-graphs."""
    primitives = (getattr(lax, name) for name in dir(lax) if name.endswith("_p"))
    return frozenset(p for p in primitives if not subjaxprs.has_bodies(p))


def _vjp(f: Any, wrt: tuple[int, ...], inputs: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    def of_active(*active):
        values = dict(zip(wrt, active, strict=True))
        return f(*(values.get(k, x) for k, x in enumerate(inputs)))

    outputs, pullback = vjp(of_active, *(inputs[k] for k in wrt))
    return pullback([_zero(x) if c is None else c for x, c in zip(outputs, cotangents, strict=True)])


def _zero(x: Any) -> Any:
    return lax.full_like(x, 0) if is_float(x) else np.zeros(x.shape, jax.dtypes.float0)
