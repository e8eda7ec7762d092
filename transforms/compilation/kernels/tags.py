"""The program with a scope around each equation, as `fg[12]`: what XLA keeps of an equation then knows it.

Scopes change nothing that XLA does, and stay on every instruction that is left of the equation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ...core import _jax, subjaxprs
from ...core.graph import Graph
from ...core.passes import Pass, run
from ...core.scope_paths import Path, joined
from ...cost.operations import work
from ...cost.table import Row

# Calls that stand as their bodies. A jit may also place or donate its operands, a remat keeps XLA from merging equations.
_CALLS = subjaxprs.CALLS - {"jit", "remat2", "compute_on"}


class Tag(NamedTuple):
    """An equation of the program, its name as in "block_0/tanh#0", and the tags of those that made its operands."""

    row: Row
    name: str
    parents: tuple[int, ...]


def tagged(graph: Graph) -> tuple[Any, list[Tag]]:
    """The graph as a jitted function of its leaves, with a scope around each equation; and the equations, by their tags."""
    p = _Tagging()

    def run_tagged(*leaves):
        outputs = run(p.within(()), graph.jaxpr, leaves)
        p.makers.clear()
        return outputs

    run_tagged.__name__ = graph.name
    return jax.jit(run_tagged, donate_argnums=donated(graph)), p.tags


class _Tagging(Pass):
    """Puts a scope around each equation.

    Attributes:
      makers: by the identity of a value, the tag of its equation; the value is kept so that no other gets its identity.
      counts: of equations of a name.
    """

    def __init__(self) -> None:
        self.tags: list[Tag] = []
        self.makers: dict[int, tuple[int, Any]] = {}
        self.counts: Counter[str] = Counter()

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """All but the bodies of a shard_map, in which operands have other types."""
        return eqn.primitive.name != "shard_map"

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Calls that mean nothing but their bodies."""
        return subjaxprs.is_plain(eqn) or eqn.primitive.name in _CALLS

    def body(self, eqn: Any, k: int) -> _Tagging:
        """The same pass in the program's own scopes."""
        return self.within(tuple(name for name in self.scope() if not name.startswith("fg[")))

    def visit(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs, computed in a scope of their own."""
        path = self.scope()
        name = self._name(eqn, path)
        if self.inlines(eqn, values):
            return super().visit(eqn, values)
        parents = tuple(self.makers[id(x)][0] for x in values if id(x) in self.makers)
        bodies, tag = subjaxprs.bodies(eqn), len(self.tags)
        is_entered = bool(bodies) and self.enters(eqn, values)
        self.tags.append(Tag(Row(eqn, path, 1, None if is_entered else work(eqn)), name, parents))
        if not is_entered:
            self._count(path, bodies)
        with jax.named_scope(f"fg[{tag}]"):
            outputs = super().visit(eqn, values)
        self.makers.update((id(x), (tag, x)) for x in outputs)
        return outputs

    def _name(self, eqn: Any, path: Path) -> str:
        name = "/".join((*path, eqn.primitive.name))
        self.counts[name] += 1
        return f"{name}#{self.counts[name] - 1}"

    def _count(self, path: Path, bodies: Sequence[subjaxprs.Body]) -> None:
        """Count equations that have no tags."""
        for eqn in (e for body in bodies for e in body.jaxpr.jaxpr.eqns):
            around = joined(path, _jax.scopes(_jax.name_stack(eqn)))
            self._name(eqn, around)
            self._count(around, subjaxprs.bodies(eqn))


def donated(graph: Graph) -> tuple[int, ...]:
    """Which inputs a graph donates that is nothing but a jitted call."""
    eqns, inputs = graph.eqns, graph.jaxpr.jaxpr.invars
    if len(eqns) == 1 and eqns[0].primitive.name == "jit":
        flags = zip(eqns[0].invars, eqns[0].params["donated_invars"], strict=True)
        donated = {v for v, is_donated in flags if is_donated and not isinstance(v, _jax.Literal)}
        return tuple(k for k, v in enumerate(inputs) if v in donated)
    return ()
