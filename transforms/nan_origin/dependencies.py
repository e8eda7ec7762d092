"""Which elements of its operands an element of a result is computed from, for JAX's operations.

A rule is `rule(element) -> [index, ...]`, with one index of NumPy for each operand, None for one that is not read; operands that
are left out at the end are not read either. An operation without a rule reads all of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..core import _jax

Index = Any  # what a NumPy array can be indexed with
WHOLE = (Ellipsis,)


def is_inexact(value: Any) -> bool:
    """Whether a value holds floats or complex numbers."""
    aval = jax.typeof(value)
    return _jax.is_array(aval) and jax.dtypes.issubdtype(aval.dtype, np.inexact)


@dataclass(frozen=True, eq=False)
class Element:
    """The element at `index` of the k-th result, of this shape, that `eqn` computes from `values`."""

    eqn: Any
    values: Sequence[Any]
    k: int
    shape: tuple[int, ...]
    index: tuple[int, ...]


_RULES: dict[str, Callable[[Element], list[Index | None]]] = {}


def reads(element: Element) -> list[Index | None]:
    """For each operand of its equation, what of it the element is computed from."""
    found = _RULES.get(element.eqn.primitive.name, _everything)(element)
    return [*found, *[None] * (len(element.values) - len(found))]


def _rule(names: str) -> Callable:
    def add(rule):
        for name in names.split():
            assert name not in _RULES, f"{name} has two rules"
            _RULES[name] = rule
        return rule

    return add


def _everything(e: Element) -> list[Index | None]:
    return [WHOLE for _ in e.values]


@_rule(
    """add add_any sub mul div rem max min pow atan2 nextafter clamp neg sign abs floor ceil round square integer_pow sqrt rsqrt
    cbrt exp exp2 expm1 log log1p logistic sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc erf_inv lgamma
    digamma polygamma igamma igammac zeta bessel_i0e bessel_i1e regularized_incomplete_beta convert_element_type
    reduce_precision copy copy_p real imag complex conj one_minus_square stop_gradient random_gamma_grad"""
)
def _elementwise(e: Element) -> list[Index | None]:
    """At the same index, or at 0 along an axis of one element that stands for all."""
    each = lambda shape: tuple(i if n > 1 else 0 for i, n in zip(e.index, shape, strict=False))
    return [each(np.shape(x)) for x in e.values]


@_rule("select_n")
def _selected(e: Element) -> list[Index | None]:
    where = e.index if np.ndim(e.values[0]) else ()
    which = int(np.asarray(e.values[0])[where])
    return [where, *(e.index if k == which else None for k in range(len(e.values) - 1))]


@_rule("optimization_barrier")
def _itself(e: Element) -> list[Index | None]:
    return [e.index if k == e.k else None for k in range(len(e.values))]


@_rule("reshape squeeze expand_dims")
def _flat(e: Element) -> list[Index | None]:
    shape = np.shape(e.values[0])
    return [np.unravel_index(np.ravel_multi_index(e.index, e.shape), shape) if shape and e.shape else (0,) * len(shape)]


@_rule("broadcast_in_dim")
def _broadcast(e: Element) -> list[Index | None]:
    dims = e.eqn.params["broadcast_dimensions"]
    sizes = np.shape(e.values[0])
    return [tuple(e.index[d] if n > 1 else 0 for d, n in zip(dims, sizes, strict=True))]


@_rule("transpose")
def _transposed(e: Element) -> list[Index | None]:
    found = [0] * len(e.index)
    for k, axis in enumerate(e.eqn.params["permutation"]):
        found[axis] = e.index[k]
    return [tuple(found)]


@_rule("rev")
def _reversed(e: Element) -> list[Index | None]:
    axes, sizes = e.eqn.params["dimensions"], np.shape(e.values[0])
    return [tuple(n - 1 - i if k in axes else i for k, (i, n) in enumerate(zip(e.index, sizes, strict=True)))]


@_rule("slice")
def _sliced(e: Element) -> list[Index | None]:
    starts, strides = e.eqn.params["start_indices"], e.eqn.params["strides"] or (1,) * len(e.index)
    return [tuple(a + i * s for a, i, s in zip(starts, e.index, strides, strict=True))]


@_rule("dynamic_slice")
def _dynamically_sliced(e: Element) -> list[Index | None]:
    starts = _starts(e.values[1:], np.shape(e.values[0]), e.eqn.params["slice_sizes"])
    return [tuple(a + i for a, i in zip(starts, e.index, strict=True)), *[() for _ in e.values[1:]]]


@_rule("dynamic_update_slice")
def _updated(e: Element) -> list[Index | None]:
    sizes = np.shape(e.values[1])
    inside = [i - a for i, a in zip(e.index, _starts(e.values[2:], np.shape(e.values[0]), sizes), strict=True)]
    is_new = all(0 <= i < n for i, n in zip(inside, sizes, strict=True))
    return [None if is_new else e.index, tuple(inside) if is_new else None, *[() for _ in e.values[2:]]]


def _starts(values, shape, sizes):
    """Where a window lies, which is moved to lie within."""
    return [min(max(int(a), 0), n - m) for a, n, m in zip(values, shape, sizes, strict=True)]


@_rule("concatenate")
def _concatenated(e: Element) -> list[Index | None]:
    axis, at, found = e.eqn.params["dimension"], 0, []
    for x in e.values:
        inside, at = e.index[axis] - at, at + np.shape(x)[axis]
        found.append((*e.index[:axis], inside, *e.index[axis + 1 :]) if 0 <= inside < np.shape(x)[axis] else None)
    return found


@_rule("pad")
def _padded(e: Element) -> list[Index | None]:
    found = []
    for i, n, (low, _, interior) in zip(e.index, np.shape(e.values[0]), e.eqn.params["padding_config"], strict=True):
        at, rest = divmod(i - low, interior + 1)
        found.append(at if rest == 0 and 0 <= at < n else None)
    return [None, ()] if None in found else [tuple(found), None]


@_rule("reduce_sum reduce_prod reduce_max reduce_min argmax argmin reduce_and reduce_or")
def _reduced(e: Element) -> list[Index | None]:
    kept = iter(e.index)
    axes = e.eqn.params["axes"]
    return [tuple(slice(None) if k in axes else next(kept) for k in range(np.ndim(x))) for x in e.values[:1]]


@_rule("cumsum cumprod cummax cummin cumlogsumexp")
def _cumulative(e: Element) -> list[Index | None]:
    axis, i = e.eqn.params["axis"], e.index[e.eqn.params["axis"]]
    part = slice(i, None) if e.eqn.params["reverse"] else slice(0, i + 1)
    return [(*e.index[:axis], part, *e.index[axis + 1 :])]


@_rule("split")
def _split(e: Element) -> list[Index | None]:
    axis = e.eqn.params["axis"]
    start = sum(e.eqn.params["sizes"][: e.k])
    return [(*e.index[:axis], start + e.index[axis], *e.index[axis + 1 :])]


@_rule("sort")
def _sorted(e: Element) -> list[Index | None]:
    axis = e.eqn.params["dimension"]
    row = (*e.index[:axis], slice(None), *e.index[axis + 1 :])
    return [row if k == e.k else None for k in range(len(e.values))]


@_rule("top_k")
def _row(e: Element) -> list[Index | None]:
    return [(*e.index[:-1], slice(None))]


@_rule("cholesky triangular_solve lu qr eigh svd")
def _matrix(e: Element) -> list[Index | None]:
    return [(*e.index[: np.ndim(x) - 2], Ellipsis) for x in e.values]


@_rule("dot_general")
def _contracted(e: Element) -> list[Index | None]:
    contracting, batch = e.eqn.params["dimension_numbers"]
    sides: list[Index | None] = []
    at = len(batch[0])
    for x, summed, shared in zip(e.values[:2], contracting, batch, strict=True):
        part: list[Any] = [slice(None)] * np.ndim(x)
        for k, axis in enumerate(shared):
            part[axis] = e.index[k]
        for axis in range(np.ndim(x)):
            if axis not in (*summed, *shared):
                part[axis], at = e.index[at], at + 1
        sides.append(tuple(part))
    return sides


@_rule(
    """gather scatter scatter-add scatter_sub scatter-sub scatter-mul scatter-min scatter-max conv_general_dilated
    reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add select_and_scatter_add"""
)
def _differentiated(e: Element) -> list[Index | None]:
    """By the derivative of the operation where all values are equal and finite, so that ties count and nothing is masked."""
    is_float = list(map(is_inexact, e.values))
    even = [
        jax.numpy.full(np.shape(x), 0.75, jax.typeof(x).dtype) for x, f in zip(e.values, is_float, strict=True) if f
    ]

    def f(*some):
        given = iter(some)
        used = [next(given) if is_f else x for x, is_f in zip(e.values, is_float, strict=True)]
        return _jax.bind(e.eqn.primitive, e.eqn.params, used)[0]

    try:
        out, pull = jax.vjp(f, *even)
        found = iter(pull(jax.numpy.zeros_like(out).at[e.index].set(1)))
    except NotImplementedError:
        return _everything(e)
    return [np.asarray(next(found)) != 0 if is_f else WHOLE for is_f in is_float]
