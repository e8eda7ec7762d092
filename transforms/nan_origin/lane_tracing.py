"""Lanes, and lines of derivative rules: observed while the function is traced once more.

An equation under `vmap` has axes of lanes, but does not say which. An equation of the backward rule of a `jax.custom_vjp`
function has the line of the call. JAX knows both only while it traces.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import tree_flatten, tree_unflatten

from ..core import _jax
from ..core.pass_trace import Bound
from .backtracking import ComputedElement, Note


def traced_details(
    f: Callable, args: tuple, kwargs: dict, element: ComputedElement, line: str | None, is_backward: bool
) -> dict[str, Any]:
    """The lanes of an element and the line of its derivative rule, where tracing shows them: "lanes" and "line".

    Args:
      f, args, kwargs: the call. It is traced with abstract arrays; the result is empty where it needs their values.
      line: the line of the element's equation. is_backward: whether it may belong to a derivative rule.
    """
    is_mapped = any(getattr(s, "name", None) == "vmap" for eqn in _around(element) for s in _jax.name_stack(eqn))
    if line is None or not (is_mapped or is_backward):
        return {}
    seen_values: list[Seen] = []
    note = lambda seen: seen_values.append(seen) if (seen.shape, seen.line) == (np.shape(element.value), line) else None
    leaves, tree = tree_flatten((args, kwargs))
    arrays = [k for k, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]

    def of_arrays(*values):
        by_place = dict(zip(arrays, values, strict=True))
        args, kwargs = tree_unflatten(tree, [by_place.get(k, x) for k, x in enumerate(leaves)])
        return f(*args, **kwargs)

    try:
        with seeing(note):
            jax.make_jaxpr(of_arrays)(*(leaves[k] for k in arrays))
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        return {}
    same_primitive = [seen for seen in seen_values if seen.primitive is element.note.eqn.primitive]
    axes = {seen.axes for seen in same_primitive or seen_values if seen.axes is not None}
    axes -= {a[:k] for a in axes for k in range(len(a))}  # of an outer vmap alone
    lines = {seen.rule_line for seen in same_primitive if seen.rule_line}
    details = {"lanes": tuple(element.index[k] for k in next(iter(axes)))} if is_mapped and len(axes) == 1 else {}
    return details | ({"line": next(iter(lines))} if is_backward and len(lines) == 1 else {})


def _around(element: ComputedElement) -> Iterator[Any]:
    """The equation that computed an element, and those around it."""
    note: Note | None = element.note
    while note:
        yield note.eqn
        note = note.level.call


# ------------------------------------------------------------------------------------------------ watching JAX trace


class Seen(NamedTuple):
    """A value while its equation is traced.

    Attributes:
      shape: of it, lanes among it. axes: those of lanes, of the outermost `vmap` first; None where that is not known.
      line: what its equation has as its line. rule_line: that of the user's derivative rule that runs, if one does.
    """

    primitive: Any
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None
    line: str | None
    rule_line: str | None


@contextlib.contextmanager
def seeing(note: Callable[[Seen], Any]) -> Iterator[None]:
    """Call `note` for each value that is traced, and trace anew what JAX has traced before."""

    def batched(primitive, outputs):
        for x in outputs:
            note(Seen(primitive, *_batched_shape(x), _line_noted(), None))

    def staged(primitive, outputs):
        if line := _rule_line():
            for x in outputs:
                note(Seen(primitive, np.shape(x), None, _line_noted(), line))

    with (
        _jax.observing(_jax.BatchTrace, batched),
        _jax.observing(_jax.StagingTrace, staged),
        jax.make_user_context()(object()),  # no cache of JAX's has an entry for it
    ):
        yield


def _batched_shape(x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a value with its lanes, and which axes these are."""
    if not isinstance(x, _jax.BatchTracer):
        return np.shape(x), ()
    shape, axes = _batched_shape(x.val)
    axis: Any = x.batch_dim
    return shape, (*axes, [k for k in range(len(shape)) if k not in axes][axis])


def _line_noted() -> str | None:
    """The line of an equation that is bound now."""
    return _jax.line_of(Bound(None, {}, _jax.current_source()))


def _rule_line() -> str | None:
    """The user's line that runs while JAX goes back through a program; None if no rule of the user's does."""
    line = None
    for frame, number in traceback.walk_stack(None):
        code = frame.f_code
        if code.co_name.startswith("backward_pass") and not _jax.is_user_file(code.co_filename):
            return line
        if line is None and _jax.is_user_file(code.co_filename):
            line = f"{code.co_filename}:{number} ({code.co_qualname})"
    return None
