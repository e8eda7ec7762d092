"""Where: what `tap`, `patch` and the rules for scopes select.

A scope is named by a pattern such as "block_*/attention": names and wildcards (`fnmatch`) between slashes, matched with the named
scopes around an equation at any depth. The backward pass lies in scopes of its own, which start with "transpose":
"transpose/block_*". A single equation is chosen by a predicate on its `Site`; `op` makes those for primitives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from . import _jax, subjaxprs
from .errors import ArgumentError

BACKWARD = "transpose"
Path: TypeAlias = tuple[str, ...]  # names of scopes from the outside in


class Site(NamedTuple):
    """An equation as a predicate sees it."""

    primitive: _jax.Primitive
    params: dict[str, Any]
    scope: str
    in_avals: tuple[Any, ...]
    out_avals: tuple[Any, ...]


Where: TypeAlias = str | Callable[[Site], Any]


def op(*primitives: str | _jax.Primitive) -> Callable[[Site], bool]:
    """A predicate that chooses the equations of these primitives, given by name or as they are.

    >>> import jax.numpy as jnp
    >>> from funcgrad.transforms import tap
    >>> list(tap(lambda x: jnp.tanh(2 * jnp.sin(x)), where=op("tanh", "sin"))(0.0)[1])
    ['sin#0', 'tanh#0']
    """
    names = [getattr(p, "name", p) for p in primitives]
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            f"op takes primitives or their names, and got {', '.join(f'{p!r:.40}' for p in primitives) or 'nothing'}.",
            hint='fg.op("tanh") or fg.op(jax.lax.tanh_p); fg.walk(graph) shows those of a graph',
        )
    return Primitives(frozenset(map(str, names)))


@dataclass(frozen=True, repr=False)
class Primitives:
    """The predicate that `op` makes."""

    names: frozenset[str]

    def __call__(self, site: Site) -> bool:
        """Whether the equation is of one of these primitives."""
        return site.primitive.name in self.names

    def __repr__(self) -> str:
        return f"op({', '.join(map(repr, sorted(self.names)))})"


def check_where(verb: str, where: Any) -> None:
    """Raise if `where` is neither a scope pattern nor a predicate."""
    if not callable(where) and not (isinstance(where, str) and where.strip("/")):
        raise ArgumentError(
            f"{verb} selects by a scope pattern or a predicate, and got {where!r:.60}.",
            hint='where="block_*/attention", where=fg.op("tanh"), or where=lambda site: "block" in site.scope',
        )


def joined(outer: Path, inner: Path) -> Path:
    """The path of what lies at `inner` within `outer`, which encloses its graph; the backward pass is entered once."""
    path = (*outer, *inner)
    start = path.index(BACKWARD) + 1 if BACKWARD in path else len(path)
    return (*path[:start], *(name for name in path[start:] if name != BACKWARD))


@lru_cache(maxsize=4096)
def entered(pattern: str, path: Path) -> Path | None:
    """The outermost of the scopes on `path` that the pattern names; None if it names none."""
    parts = tuple(pattern.strip("/").split("/"))
    first, last = 0, len(path)
    if BACKWARD in path:
        last = path.index(BACKWARD)
    if parts[0] == BACKWARD:
        parts, first, last = parts[1:], last + 1, len(path)
    for end in range(first + len(parts), last + 1):
        if all(map(fnmatchcase, path[end - len(parts) : end], parts)):
            return path[:end]
    return None


def is_within(path: Path, scope: Path) -> bool:
    """Whether what lies at `path` is in `scope`, or is it."""
    return path[: len(scope)] == scope


def maker(eqn: Any, k: int, path: Path, through: Sequence[str] = ("jit",)) -> tuple[list[Any], Path]:
    """The equation that computes the k-th output of `eqn`, behind the calls around it, and where it lies if `eqn` is at `path`.

    Args:
      through: the primitives that are looked through, whose outputs are those of their one sub-graph in order.
    """
    if eqn.primitive.name in through:
        jaxpr = subjaxprs.bodies(eqn)[0].jaxpr.jaxpr
        for inner in jaxpr.eqns:
            if jaxpr.outvars[k] in inner.outvars:
                path = joined(path, _jax.scopes(_jax.name_stack(inner)))
                calls, path = maker(inner, inner.outvars.index(jaxpr.outvars[k]), path, through)
                return [eqn, *calls], path
    return [eqn], path
