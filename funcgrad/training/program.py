"""The compiled program: one dispatch of a step, over one batch or several.

A single batch runs as it is; several are stacked and scanned. The state is donated, and comes back as it went in: same
tree, shapes, dtypes and devices. So each number of batches compiles once.
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


def prepare(step: Callable[..., Any], state: Any) -> Program:
    """The program of `step` for states placed as `state` is: the same at each call, so that no epoch compiles again."""
    try:
        known = _programs.setdefault(step, {})
    except TypeError:  # no hash, or no weak references
        known = {}
    leaves, tree = jax.tree.flatten(state)
    places = tuple(leaf.sharding for leaf in leaves) if any(leaf.committed for leaf in leaves) else None
    if (tree, places) not in known:
        shardings = jax.tree.unflatten(tree, places) if places else None
        known[tree, places] = Program(jax.jit(_dispatch(step), donate_argnums=0, out_shardings=(shardings, None)))
    return known[tree, places]


def _dispatch(step: Callable[..., Any]) -> Callable[..., Any]:
    alive: Any
    try:
        alive = weakref.ref(step)  # `_programs` keeps this function, which must not keep its key
    except TypeError:
        alive = lambda: step

    def one(state: Any, batch: Any) -> tuple[Any, Any]:
        return checked(alive(), state, batch)

    def dispatch(state: Any, batches: tuple[Any, ...]) -> tuple[Any, Any]:
        if len(batches) > 1:
            return lax.scan(one, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))
        state, metrics = one(state, *batches)
        return state, jax.tree.map(lambda metric: metric[None], metrics)

    return dispatch


def checked(step: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """`step(state, batch)`, or an ArgumentError where a loop cannot go on with what it returns."""
    at = location(getattr(step, "loss", step))
    out = step(state, batch)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        kinds = ", ".join(_kind(part) for part in out) if isinstance(out, tuple) else _kind(out)
        what = f"train needs a step that returns (state, metrics), metrics a dict of arrays, but it returned {kinds}."
        raise ArgumentError(what, at=at, hint='return state, {"loss": loss}')
    after, metrics = out
    if found := changes(state, after, "state"):
        what = "train needs a step that returns its state with the tree, shapes and dtypes that it got."
        raise ArgumentError(what, at=at, inputs=found, hint="cast what changed back, as in new.astype(old.dtype)")

    def strong(new: Any, old: Any) -> Any:
        keep = jax.typeof(new).weak_type == jax.typeof(old).weak_type
        return new if keep else lax.convert_element_type(new, old.dtype)

    return jax.tree.map(strong, after, state), jax.tree.map(jnp.asarray, metrics)


def strengthen(run: Any, state: Any, batches: tuple[Any, ...]) -> Any:
    """`state` without the weak types that a step does not give back, as in lax.scan: they would compile it twice."""
    while True:
        after, _ = run.trace(state, batches).out_info
        weak = jax.tree.map(lambda old, new: jax.typeof(old).weak_type and not new.weak_type, state, after)
        if not any(jax.tree.leaves(weak)):
            return state
        strip = lambda leaf, weak: lax.convert_element_type(leaf, leaf.dtype) if weak else leaf
        state = jax.tree.map(strip, state, weak)


def place(state: Any, batch: Any) -> Any:
    """`state` where the first batch is: what no one has committed to a device is copied to each device of the batch."""
    homes = [leaf.sharding for leaf in jax.tree.leaves((state, batch)) if getattr(leaf, "committed", False)]
    if not homes:
        return state
    home = next((home for home in homes if isinstance(home, NamedSharding)), homes[0])
    spread = NamedSharding(home.mesh, PartitionSpec()) if isinstance(home, NamedSharding) else home
    return jax.tree.map(lambda leaf: leaf if leaf.committed else jax.device_put(leaf, spread), state)


def changes(before: Any, after: Any, name: str) -> str:
    """What differs in trees, shapes or dtypes, by path; empty if nothing does."""
    old, new = ({keystr(path): _kind(leaf) for path, leaf in tree_leaves_with_path(tree)} for tree in (before, after))
    rows = [
        f"{name}{path} {old.get(path, 'absent')} → {new.get(path, 'absent')}"
        for path in old | new
        if old.get(path) != new.get(path)
    ]
    tree, other = map(str, (jax.tree.structure(before), jax.tree.structure(after)))
    if not rows and tree != other:
        return f"{name} {tree} → {other}"
    return ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


def _kind(leaf: Any) -> str:
    shape = getattr(leaf, "shape", None)
    return type(leaf).__name__ if shape is None else f"{leaf.dtype}[{','.join(map(str, shape))}]"
