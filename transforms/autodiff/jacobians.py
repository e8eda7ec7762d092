"""Jacobians in chunks: `jacfwd`, `jacrev` and `hessian` some tangents or cotangents at a time.

As in JAX, a jacobian is the vmap of a pushforward or pullback over the standard basis; here each chunk of the basis is computed
where it is used. JAX's own verb is traced first, so that JAX's errors come first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.dtypes import float0
from jax.tree_util import tree_flatten, tree_leaves, tree_structure, tree_transpose, tree_unflatten

from ..batching.chunking import chunked, has_effects, in_chunks
from ..core import _jax


def jacobian(transform: Callable, f: Callable, options: dict, name: str, memory: Any, chunk: int | None) -> Callable:
    """`transform(f, **options)` in chunks, as `chunked` chooses them.

    Args:
      transform: `jax.jacfwd`, `jax.jacrev` or `jax.hessian`; the chunks of a hessian are those of its outer pass, forward.
    """
    plain = transform(f, **options)
    argnums, has_aux = options["argnums"], options["has_aux"]
    target = jax.jacrev(f, **options) if transform is jax.hessian else f
    cut = _by_rows if transform is jax.jacrev else _by_columns

    def program(size):
        if size is None:
            return lambda *args, **kwargs: plain(*args, **kwargs)
        return lambda *args, **kwargs: cut(*split_argnums(target, argnums, args, kwargs), has_aux, size)

    def lanes(*args, **kwargs):
        jax.eval_shape(plain, *args, **kwargs)  # raises JAX's errors
        of_chosen, chosen = split_argnums(target, argnums, args, kwargs)
        if transform is jax.jacrev:
            out = jax.eval_shape(of_chosen, chosen)
            chosen = out[0] if has_aux else out
        return sum(math.prod(jnp.shape(x)) for x in tree_leaves(chosen))

    return chunked(program, lanes, name, memory, chunk)


def split_argnums(f: Callable, argnums: Any, args: tuple, kwargs: dict) -> tuple[Callable, Any]:
    """`f` as a function of the arguments in `argnums`, one or a tuple of them; and these arguments."""
    numbers = [k % len(args) for k in ((argnums,) if isinstance(argnums, int) else argnums)]

    def of_chosen(chosen):
        by_number = dict(zip(numbers, (chosen,) if isinstance(argnums, int) else chosen, strict=True))
        return f(*(by_number.get(k, x) for k, x in enumerate(args)), **kwargs)

    return of_chosen, args[numbers[0]] if isinstance(argnums, int) else tuple(args[k] for k in numbers)


def _by_columns(of_chosen: Callable, chosen: Any, has_aux: bool, chunk: int) -> Any:
    """Forward mode: `chunk` tangents at a time."""
    primals, tree = tree_flatten(chosen)
    options: dict[str, Any] = dict(has_aux=has_aux)
    if has_effects(jax.make_jaxpr(of_chosen)(chosen)):  # effects happen once, so residuals are kept
        out, linear, *aux = jax.linearize(of_chosen, chosen, **options)
        pushed = lambda tangent: (out, linear(tangent), *aux)
    else:
        pushed = lambda tangent: jax.jvp(of_chosen, (chosen,), (tangent,), **options)

    def piece(start, size):
        def push(*tangents):
            out, tangent, *aux = pushed(tree_unflatten(tree, tangents))
            return jax.tree.map(lambda y, t: jnp.zeros_like(y) if t.dtype == float0 else t, out, tangent), *aux

        rows, *aux = jax.vmap(push, out_axes=(0, None) if has_aux else (0,))(*_basis(start, size, primals))
        rows = lax.optimization_barrier(rows)  # keeps the transpose out of the last product, which it slows down
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), rows), *aux

    columns, *aux = in_chunks(piece, _ends(primals)[-1], chunk, (-1, None) if has_aux else (-1,))
    jac = jax.tree.map(lambda x: tree_unflatten(tree, _parted(x, -1, primals)), columns)
    return (jac, *aux) if has_aux else jac


def _by_rows(of_chosen: Callable, chosen: Any, has_aux: bool, chunk: int) -> Any:
    """Reverse mode: `chunk` cotangents at a time, with one set of residuals."""
    options: dict[str, Any] = dict(has_aux=has_aux)
    out, pullback, *aux = jax.vjp(of_chosen, chosen, **options)
    outputs, out_tree = tree_flatten(out)
    primals, tree = tree_flatten(chosen)
    is_inexact = [jnp.issubdtype(jax.typeof(x).dtype, np.inexact) for x in primals]  # integers have no derivative

    def piece(start, size):
        basis = tree_unflatten(out_tree, _basis(start, size, outputs))
        return [g for g, f in zip(tree_leaves(jax.vmap(pullback)(basis)), is_inexact, strict=True) if f]

    rows = iter(in_chunks(piece, _ends(outputs)[-1], chunk, 0))
    blocks = []
    for x, f in zip(primals, is_inexact, strict=True):
        whole = next(rows) if f else jnp.zeros((_ends(outputs)[-1], *jnp.shape(x)), jax.typeof(x).dtype)
        blocks.append([_jax.cast(part, jax.typeof(x)) for part in _parted(whole, 0, outputs)])
    jac = tree_unflatten(tree, [tree_unflatten(out_tree, block) for block in blocks])
    jac = tree_transpose(tree_structure(chosen), out_tree, jac)
    return (jac, *aux) if has_aux else jac


def _ends(leaves: Sequence[Any]) -> list[int]:
    """Where each leaf ends among the elements of all."""
    return list(itertools.accumulate(math.prod(jnp.shape(x)) for x in leaves))


def _basis(start: Any, size: int, leaves: Sequence[Any]) -> list[Any]:
    """Vectors start to start + size of the standard basis of all elements of the leaves, in their shapes and dtypes."""
    basis = []
    for x, end in zip(leaves, _ends(leaves), strict=True):
        count = math.prod(jnp.shape(x))
        rows = jnp.arange(size, dtype=np.int32)[:, None] + start - (end - count)
        one_hot = rows == jnp.arange(count, dtype=np.int32)
        basis.append(one_hot.astype(jax.typeof(x).dtype).reshape(size, *jnp.shape(x)))
    return basis


def _parted(x: Any, axis: int, leaves: Sequence[Any]) -> list[Any]:
    """`x`, whose `axis` runs over the elements of all leaves, as one array per leaf, with the leaf's shape in its place."""
    k = axis % x.ndim
    parts = jnp.split(x, _ends(leaves)[:-1], k) if len(leaves) > 1 else [x]
    return [p.reshape(*x.shape[:k], *jnp.shape(y), *x.shape[k + 1 :]) for p, y in zip(parts, leaves, strict=True)]
