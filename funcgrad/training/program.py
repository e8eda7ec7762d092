"""The compiled program of a step: one dispatch runs one batch or several.

Several batches are stacked and scanned. The program donates the state, and returns it with the same tree, shapes, dtypes and
devices. So it compiles once for each number of batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path

from ..transforms.core.errors import ArgumentError, location


@dataclass
class Program:
    """`run(state, batches) -> (state, metrics)`, with one row of metrics per batch."""

    run: Any
    compile_s: float = 0.0  # the longest compilation so far


_programs: weakref.WeakKeyDictionary[Callable, dict[Any, Program]] = weakref.WeakKeyDictionary()


def program_of(step: Callable[..., Any], state: Any) -> Program:
    """The program of `step` for the tree and the placement of `state`: cached, so that no epoch compiles again."""
    try:
        programs = _programs.setdefault(step, {})
    except TypeError:  # no hash, or no weak references
        programs = {}
    leaves, tree = jax.tree.flatten(state)
    placement = tuple(leaf.sharding for leaf in leaves) if any(leaf.committed for leaf in leaves) else None
    if (tree, placement) not in programs:
        shardings = jax.tree.unflatten(tree, placement) if placement else None
        run = jax.jit(_dispatch(step), donate_argnums=0, out_shardings=(shardings, None))
        programs[tree, placement] = Program(run)
    return programs[tree, placement]


def _dispatch(step: Callable[..., Any]) -> Callable[..., Any]:
    step_ref: Any
    try:
        step_ref = weakref.ref(step)  # `_programs` holds this function, which must not hold its key
    except TypeError:
        step_ref = lambda: step

    def run_one(state: Any, batch: Any) -> tuple[Any, Any]:
        return _call_step(step_ref(), state, batch)

    def dispatch(state: Any, batches: tuple[Any, ...]) -> tuple[Any, Any]:
        if len(batches) > 1:
            return lax.scan(run_one, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))
        state, metrics = run_one(state, *batches)
        return state, jax.tree.map(lambda metric: metric[None], metrics)

    return dispatch


def _call_step(step: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """`step(state, batch)`. Raises an ArgumentError if its outputs cannot be the carry and the metrics of a loop."""
    at = location(getattr(step, "loss", step))
    out = step(state, batch)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        kinds = ", ".join(map(_kind, out)) if isinstance(out, tuple) else _kind(out)
        what = f"train needs a step that returns (state, metrics), metrics a dict of arrays, but it returned {kinds}."
        raise ArgumentError(what, at=at, hint='return state, {"loss": loss}')
    new_state, metrics = out
    if differences := changes(state, new_state, "state"):
        what = "train needs a step that returns its state with the tree, shapes and dtypes that it got."
        raise ArgumentError(what, at=at, inputs=differences, hint="cast what changed back, as in new.astype(old.dtype)")

    def with_weak_type_of(old: Any, new: Any) -> Any:
        is_same = jax.typeof(new).weak_type == jax.typeof(old).weak_type
        return new if is_same else lax.convert_element_type(new, old.dtype)

    return jax.tree.map(with_weak_type_of, state, new_state), jax.tree.map(jnp.asarray, metrics)


def strengthen(run: Any, state: Any, batches: tuple[Any, ...]) -> Any:
    """`state` without the weak types that a step does not return: these would compile it twice. lax.scan does the same."""
    while True:
        new_state, _ = run.trace(state, batches).out_info
        is_weakened = jax.tree.map(lambda old, new: jax.typeof(old).weak_type and not new.weak_type, state, new_state)
        if not any(jax.tree.leaves(is_weakened)):
            return state
        strip = lambda leaf, is_weak: lax.convert_element_type(leaf, leaf.dtype) if is_weak else leaf
        state = jax.tree.map(strip, state, is_weakened)


def place(state: Any, batch: Any) -> Any:
    """`state` on the devices of the first batch: leaves that are not committed are copied to each of them."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves((state, batch)) if getattr(leaf, "committed", False)]
    if not shardings:
        return state
    target = next((s for s in shardings if isinstance(s, NamedSharding)), shardings[0])
    if isinstance(target, NamedSharding):
        target = NamedSharding(target.mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: leaf if leaf.committed else jax.device_put(leaf, target), state)


def changes(before: Any, after: Any, name: str) -> str:
    """The differences in trees, shapes or dtypes, by path; empty if there are none."""
    old, new = ({keystr(path): _kind(leaf) for path, leaf in tree_leaves_with_path(tree)} for tree in (before, after))
    rows = [
        f"{name}{path} {old.get(path, 'absent')} → {new.get(path, 'absent')}"
        for path in old | new
        if old.get(path) != new.get(path)
    ]
    old_tree, new_tree = map(str, (jax.tree.structure(before), jax.tree.structure(after)))
    if not rows and old_tree != new_tree:
        return f"{name} {old_tree} → {new_tree}"
    return ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


def _kind(leaf: Any) -> str:
    shape = getattr(leaf, "shape", None)
    return type(leaf).__name__ if shape is None else f"{leaf.dtype}[{','.join(map(str, shape))}]"
