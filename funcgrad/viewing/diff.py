"""`diff`: the difference of two graphs, equation by equation."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import jax
import numpy as np

from ..transforms import Graph, cost, walk
from ..transforms.core._jax import Literal
from ..transforms.core.errors import ArgumentError
from ..transforms.core.subjaxprs import bodies
from ..transforms.core.text import Names, equation, graph_lines
from ..transforms.cost.formatting import format_count

CONTEXT = 2  # unchanged lines shown around a change


@dataclass(frozen=True, repr=False)
class Diff:
    """The difference of two graphs. Its text marks removed lines with "-" and added lines with "+".

    Attributes:
      before, after: the graphs.
      lines: all lines of both as (mark, text), the mark one of " ", "-", "+". Unchanged values have the same name in both, so a
        line differs only if it is another equation, or reads another value.
    """

    before: Graph
    after: Graph
    lines: tuple[tuple[str, str], ...]

    @cached_property
    def primitives(self) -> dict[str, int]:
        """Primitive -> change of its number of equations, at any depth; unchanged ones are left out."""
        count = Counter(eqn.primitive.name for _, eqn in walk(self.after))
        count.subtract(eqn.primitive.name for _, eqn in walk(self.before))
        return {name: n for name, n in sorted(count.items()) if n}

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return any(mark != " " for mark, _ in self.lines)

    def __repr__(self) -> str:
        marks = Counter(mark for mark, _ in self.lines)
        return f"Diff({self.before.name} -> {self.after.name}, {marks['-']} lines removed, {marks['+']} added)"

    def __str__(self) -> str:
        return "\n".join([*self._head(), *(f"{mark} {text}" for mark, text in self._shown())])

    def _head(self) -> list[str]:
        if not self:
            return [f"{self.before.name} -> {self.after.name}: the same"]
        flops = " -> ".join(format_count(cost(graph).flops, "FLOP") for graph in (self.before, self.after))
        changes = ", ".join(f"{n:+d} {name}" for name, n in self.primitives.items())
        return [f"{self.before.name} -> {self.after.name}: {changes or 'as many of each primitive'}; {flops}"]

    def _shown(self) -> Iterator[tuple[str, str]]:
        """The changes with CONTEXT lines around them; "…" stands for the lines between."""
        near = {k + d for k, (mark, _) in enumerate(self.lines) if mark != " " for d in range(-CONTEXT, CONTEXT + 1)}
        for is_near, group in itertools.groupby(range(len(self.lines)), key=near.__contains__):
            if is_near:
                yield from (self.lines[k] for k in group)
            elif near:
                yield " ", "…"

    def html(self) -> str:
        """The same as HTML: added lines are blue, removed lines are orange."""
        colour = {"+": "background:#dcecf7", "-": "background:#fbe6d8", " ": ""}
        rows = "".join(
            f'<tr style="{colour[mark]}"><td style="padding:0 .6em">{mark}</td>'
            f'<td style="text-align:left;white-space:pre">{escape(text)}</td></tr>'
            for mark, text in self._shown()
        )
        head = escape("\n".join(self._head()))
        return f'<p>{head}</p><table style="font-family:monospace;border-collapse:collapse">{rows}</table>'

    _repr_html_ = html


def diff(before: Graph, after: Graph) -> Diff:
    """The difference of two graphs: the equations that a transform or an edit removed and added.

    Equations are matched by primitive, parameters and types, in program order and at any depth of sub-graphs.

    Args:
      before, after: Graphs, of the same function or not.
    Returns:
      Diff. Its text shows the changes; it is false if there are none.
    Raises:
      ArgumentError: not two Graphs. Also a TypeError.

    >>> import jax.numpy as jnp
    >>> import funcgrad as fg
    >>> graph = fg.trace(lambda x: jnp.sin(x) * jnp.tanh(x), 1.0)
    >>> print(fg.diff(graph, fg.patch(graph, where=fg.op("tanh"), replace=jnp.cos)))
    <lambda> -> patch(<lambda>): +1 cos; 1 FLOP -> 1 FLOP
      …
        a:f32[] = sin x
        b:f32[] = tanh x
    -   c:f32[] = mul a b
    +   d:f32[] = cos b
    +   c:f32[] = mul a d
        return c
    """
    for graph in (before, after):
        if not isinstance(graph, Graph):
            what = f"diff takes two Graphs, and got {type(graph).__name__}."
            raise ArgumentError(what, hint="fg.diff(graph, fg.grad(graph))")
    names = Names(before)
    old = _lines(before, names)
    matched = _pairs(before.jaxpr, after.jaxpr)
    by_variable = {w: names.by_variable[v] for v, w in matched if v in names.by_variable}
    new = _lines(after, Names(after, by_variable, names.by_variable.values()))
    lines: list[tuple[str, str]] = []
    for tag, a, b, c, d in _opcodes(old, new):
        if tag == "equal":
            lines += [(" ", line) for line in old[a:b]]
        else:
            lines += [("-", line) for line in old[a:b]] + [("+", line) for line in new[c:d]]
    return Diff(before, after, tuple(lines))


def _lines(graph: Graph, names: Names) -> list[str]:
    """The lines of a graph's text, without its name."""
    head, body = graph_lines(graph, names)
    return [head[0].removeprefix(graph.name), *head[1:], *body]


def _pairs(before: Any, after: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of variables of two closed jaxprs: at the same place of matched equations, or equal constants."""
    constants = zip(before.jaxpr.constvars, before.consts, after.jaxpr.constvars, after.consts, strict=False)
    yield from ((v, w) for v, x, w, y in constants if _are_equal(x, y))
    old_eqns, new_eqns = before.jaxpr.eqns, after.jaxpr.eqns
    for tag, a, b, c, _ in _opcodes(list(map(_key, old_eqns)), list(map(_key, new_eqns))):
        for k in range(b - a if tag == "equal" else 0):
            old, new = old_eqns[a + k], new_eqns[c + k]
            yield from zip(old.outvars, new.outvars, strict=True)
            for old_body, new_body in zip(bodies(old), bodies(new), strict=True):
                yield from zip(old_body.jaxpr.jaxpr.invars, new_body.jaxpr.jaxpr.invars, strict=False)
                yield from _pairs(old_body.jaxpr, new_body.jaxpr)


def _are_equal(x: Any, y: Any) -> bool:
    """Whether two constants are the same object, or arrays of equal values."""
    if x is y or not (hasattr(x, "dtype") and hasattr(y, "dtype")):
        return x is y
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    return np.array_equal(np.asarray(x), np.asarray(y))


def _key(eqn: Any) -> Hashable:
    """The text of an equation without the names of its variables, and its number of sub-graphs."""
    return equation(eqn, lambda atom: str(atom.val) if isinstance(atom, Literal) else "_"), len(bodies(eqn))


def _opcodes(old: Sequence[Hashable], new: Sequence[Hashable]) -> Iterator[tuple[str, int, int, int, int]]:
    """The opcodes of difflib. The search skips the common prefix and suffix, since graphs may be long."""
    shorter = min(len(old), len(new))
    first = next((k for k in range(shorter) if old[k] != new[k]), shorter)
    last = next((k for k in range(shorter - first) if old[-1 - k] != new[-1 - k]), shorter - first)
    if first:
        yield "equal", 0, first, 0, first
    middle = old[first : len(old) - last], new[first : len(new) - last]
    for tag, a, b, c, d in difflib.SequenceMatcher(None, *middle, autojunk=False).get_opcodes():
        yield tag, a + first, b + first, c + first, d + first
    if last:
        yield "equal", len(old) - last, len(old), len(new) - last, len(new)
