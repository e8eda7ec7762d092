"""Which elements of its operands an element of a result is computed from, for JAX's operations.

A rule is `rule(element) -> [index, ...]`, with a NumPy index for each operand that the element reads, and None for the others;
operands that are missing at the end are not read. An operation without a rule reads all of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..core import _jax

Index = Any  # of a NumPy array
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
    indices = _RULES.get(element.eqn.primitive.name, _everything)(element)
    return [*indices, *[None] * (len(element.values) - len(indices))]


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
    """At the same index, or at 0 along an axis of size one."""
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
    return [tuple(e.index[k] for k in np.argsort(e.eqn.params["permutation"]))]


@_rule("rev")
def _reversed(e: Element) -> list[Index | None]:
    axes = e.eqn.params["dimensions"]
    return [tuple(n - 1 - i if k in axes else i for k, (i, n) in enumerate(zip(e.index, e.shape, strict=True)))]


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
    """The start of a window, clamped so that the window lies within the array."""
    return [min(max(int(a), 0), n - m) for a, n, m in zip(values, shape, sizes, strict=True)]


@_rule("concatenate")
def _concatenated(e: Element) -> list[Index | None]:
    axis, i, indices = e.eqn.params["dimension"], e.index[e.eqn.params["dimension"]], []
    for x in e.values:
        size = np.shape(x)[axis]
        indices.append(_replaced(e.index, axis, i) if 0 <= i < size else None)
        i -= size
    return indices


@_rule("pad")
def _padded(e: Element) -> list[Index | None]:
    index: list[int] = []
    for i, n, (low, _, interior) in zip(e.index, np.shape(e.values[0]), e.eqn.params["padding_config"], strict=True):
        k, rest = divmod(i - low, interior + 1)
        if rest or not 0 <= k < n:
            return [None, ()]
        index.append(k)
    return [tuple(index), None]


@_rule("reduce_sum reduce_prod reduce_max reduce_min argmax argmin reduce_and reduce_or")
def _reduced(e: Element) -> list[Index | None]:
    rest, axes = iter(e.index), e.eqn.params["axes"]
    return [tuple(slice(None) if k in axes else next(rest) for k in range(np.ndim(e.values[0])))]


@_rule("cumsum cumprod cummax cummin cumlogsumexp")
def _cumulative(e: Element) -> list[Index | None]:
    axis = e.eqn.params["axis"]
    i = e.index[axis]
    return [_replaced(e.index, axis, slice(i, None) if e.eqn.params["reverse"] else slice(0, i + 1))]


@_rule("split")
def _split(e: Element) -> list[Index | None]:
    axis = e.eqn.params["axis"]
    return [_replaced(e.index, axis, sum(e.eqn.params["sizes"][: e.k]) + e.index[axis])]


@_rule("sort")
def _sorted(e: Element) -> list[Index | None]:
    row = _replaced(e.index, e.eqn.params["dimension"], slice(None))
    return [row if k == e.k else None for k in range(len(e.values))]


@_rule("top_k")
def _row(e: Element) -> list[Index | None]:
    return [(*e.index[:-1], slice(None))]


def _replaced(index: tuple[int, ...], axis: int, entry: Any) -> Index:
    return (*index[:axis], entry, *index[axis + 1 :])


@_rule("cholesky triangular_solve lu qr eigh svd")
def _matrix(e: Element) -> list[Index | None]:
    return [(*e.index[: np.ndim(x) - 2], Ellipsis) for x in e.values]


@_rule("dot_general")
def _contracted(e: Element) -> list[Index | None]:
    contracting, batch = e.eqn.params["dimension_numbers"]
    shared, free = e.index[: len(batch[0])], iter(e.index[len(batch[0]) :])  # indices of the result: batch, lhs, rhs
    entries: Any = [
        {**dict.fromkeys(summed, slice(None)), **dict(zip(axes, shared, strict=True))}
        for summed, axes in zip(contracting, batch, strict=True)
    ]
    return [
        tuple(fixed[axis] if axis in fixed else next(free) for axis in range(np.ndim(x)))
        for x, fixed in zip(e.values, entries, strict=True)
    ]


@_rule(
    """gather scatter scatter-add scatter_sub scatter-sub scatter-mul scatter-min scatter-max conv_general_dilated
    reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add select_and_scatter_add"""
)
def _differentiated(e: Element) -> list[Index | None]:
    """By the derivative of the operation where all values are equal and finite, so that ties count and nothing is masked."""
    is_float = list(map(is_inexact, e.values))
    avals = [jax.typeof(x) for x in filter(is_inexact, e.values)]
    points = [jax.numpy.full(a.shape, 0.75, a.dtype) for a in avals]

    def f(*floats):
        rest = iter(floats)
        operands = [next(rest) if is_f else x for x, is_f in zip(e.values, is_float, strict=True)]
        return _jax.bind(e.eqn.primitive, e.eqn.params, operands)[0]

    try:
        out, pullback = jax.vjp(f, *points)
        cotangents = iter(pullback(jax.numpy.zeros_like(out).at[e.index].set(1)))
    except NotImplementedError:
        return _everything(e)
    return [np.asarray(next(cotangents)) != 0 if is_f else WHOLE for is_f in is_float]
