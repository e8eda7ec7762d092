"""The derivative of one operation that ran: through which inputs it varies, and its pull-back, compiled once per kind."""

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


def varying(f: Any, inputs: Sequence[Any], varied: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Through which of these inputs `f`, an Operation or another function, varies, and which of its outputs do.

    Where a derivative is zero whatever the values are, as that of floor, nothing varies.
    """
    avals = tuple(map(jax.typeof, inputs))
    if isinstance(f, Operation) and f.primitive in _operations():
        with suppress(TypeError):  # parameters without a hash
            return _varying(f.primitive, tuple(f.params.items()), avals, varied)
    return varied, _outputs_of(_jax.stage_flat(f, avals, _jax.no_names), varied)


def pulled_back(f: Any, inputs: Sequence[Any], varied: tuple[int, ...], cotangents: Sequence[Any]) -> list[Any]:
    """The cotangents of some inputs of `f`, of those of its outputs, which are None where nothing depends on them."""
    if not isinstance(f, Operation):
        return _pull_back(f, varied, inputs, cotangents)
    kept = _of_operation if f.primitive in _operations() else _of_program
    try:
        compiled = kept(f.primitive, tuple(f.params.items()), varied)
    except TypeError:  # parameters without a hash
        compiled = _compiled(f.primitive, tuple(f.params.items()), varied)
    return compiled(inputs, cotangents)


def is_float(x: Any) -> bool:
    """Whether a value has real or complex elements."""
    return jax.dtypes.issubdtype(getattr(jax.typeof(x), "dtype", bool), np.inexact)


@functools.lru_cache(maxsize=4096)
def _varying(primitive: Any, params: tuple, avals: tuple, varied: tuple[int, ...]) -> Any:
    operation: Any = Operation(primitive, dict(params))
    jaxpr = _jax.stage_flat(operation, avals, _jax.no_names)
    return tuple(k for k in varied if _outputs_of(jaxpr, (k,))), _outputs_of(jaxpr, varied)


def _outputs_of(jaxpr: Any, varied: tuple[int, ...]) -> tuple[int, ...]:
    """The outputs that vary with some inputs: those with tangents."""
    _, found = _jax.jvp_of(jaxpr, [k in varied for k in range(len(jaxpr.in_avals))], False)
    return tuple(k for k, is_varying in enumerate(found) if is_varying)


def _compiled(primitive: Any, params: tuple, varied: tuple[int, ...]) -> Callable:
    return jax.jit(functools.partial(_pull_back, Operation(primitive, dict(params)), varied))


# JAX's own operations hold nothing of the user's; bodies of loops and callbacks do, so few of these are kept.
_of_operation = functools.lru_cache(maxsize=4096)(_compiled)
_of_program = functools.lru_cache(maxsize=64)(_compiled)


@functools.cache
def _operations() -> frozenset[Any]:
    """JAX's own operations without sub-graphs."""
    every = (getattr(lax, name) for name in dir(lax) if name.endswith("_p"))
    return frozenset(p for p in every if not subjaxprs.has_bodies(p))


def _pull_back(f: Any, varied: tuple[int, ...], inputs: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    def of_varied(*some):
        given = dict(zip(varied, some, strict=True))
        return f(*(given.get(k, x) for k, x in enumerate(inputs)))

    outputs, pull = vjp(of_varied, *(inputs[k] for k in varied))
    return pull([_zero(x) if c is None else c for x, c in zip(outputs, cotangents, strict=True)])


def _zero(x: Any) -> Any:
    return lax.full_like(x, 0) if is_float(x) else np.zeros(x.shape, jax.dtypes.float0)
