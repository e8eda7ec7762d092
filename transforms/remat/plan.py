"""`budgeted`: a derivative within a memory budget. `Plan`: its bytes, its FLOPs, and what it saves and recomputes.

The planner is imported at the first call, so that importing funcgrad is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.tree_util import tree_flatten

from ..core import _jax
from ..core.errors import ArgumentError, location
from ..core.graph import Graph, trace
from ..core.report import Report, Result, Table
from ..core.scope_paths import BACKWARD, maker
from ..core.signatures import name_of
from ..cost.formatting import format_bytes, format_count, parse_bytes
from ..cost.operations import nbytes
from ..cost.table import cost
from ..while_loops.schedule import Loops

if TYPE_CHECKING:
    from .planner import Planner


@dataclass(frozen=True)
class Part:
    """The saved or recomputed arrays of one scope, or of one line outside of any scope.

    Attributes:
      where: the scope, or the source line.
      values: the number of arrays.
      bytes: of saved arrays; flops: of recomputation.
    """

    where: str
    values: int
    bytes: int = 0
    flops: float = 0


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """A derivative within a budget.

    Attributes:
      name: of the derivative, as "grad(loss)".
      limit_bytes: the budget. All bytes are those of XLA's temporaries; arguments and results come on top.
      default_bytes: of the program without a budget, compiled.
      predicted_bytes, compiled_bytes: of this program, as simulated and as XLA reports it.
      flops, default_flops: of this program and of that without a budget; a multiply-add is two.
      saved: the arrays that the forward pass keeps, the most bytes first; empty where the default fits.
      recomputed: the recomputed arrays, the most FLOPs first.
      compiles: the number of programs that were compiled for this plan.
      graph: the program.
    """

    name: str
    limit_bytes: int
    default_bytes: int
    predicted_bytes: int
    compiled_bytes: int
    flops: float
    default_flops: float
    saved: tuple[Part, ...]
    recomputed: tuple[Part, ...]
    compiles: int
    graph: Graph

    @property
    def extra_flops(self) -> float:
        """The FLOPs of recomputation, as a fraction of those of the default."""
        return self.flops / self.default_flops - 1 if self.default_flops else 0.0

    def __repr__(self) -> str:
        return f"Plan({self.name}, {format_bytes(self.compiled_bytes)}, FLOPs {self.extra_flops:+.1%})"

    def report(self, *, lines: int = 12) -> Report:
        """The bytes and FLOPs, and the `lines` largest parts of what is saved and recomputed."""
        budget, default = format_bytes(self.limit_bytes), format_bytes(self.default_bytes)
        compiled, predicted = format_bytes(self.compiled_bytes), format_bytes(self.predicted_bytes)
        totals = [
            ("compiled", f"{compiled}, predicted {predicted}, without a budget {default}"),
            ("FLOPs", f"{format_count(self.flops)}, {self.extra_flops:+.1%}"),
            ("compiles", f"{self.compiles}"),
        ]
        saved = [(format_bytes(p.bytes), f"{p.values}", p.where) for p in self.saved]
        recomputed = [(format_count(p.flops), f"{p.values}", p.where) for p in self.recomputed]
        parts = (
            Table(saved, ("bytes", "values", "where"), ">>", "saved", lines),
            Table(recomputed, ("FLOPs", "values", "where"), ">>", "computed again", lines),
        )
        head = f"{self.name} within {budget} of temporaries"
        return Report((head, Table(totals), *(table for table in parts if table.rows)))


def budgeted(transform: Callable, f: Callable, *, options: dict, loops: Loops | None, memory: Any) -> Callable:
    """`transform(f, **options)`, compiled, with temporaries within `memory`.

    Planners are memoised by the types of the traced arguments and the values of the static ones.
    """
    limit = parse_bytes(memory)
    planners: dict[Any, Planner] = {}

    def derived(*args, **kwargs):
        planner, values = _planner(transform, f, args, kwargs, options, loops, planners)
        return planner.run(planner.answer(limit)[0], values)

    return derived


def planned(
    transform: Callable, f: Callable, *args: Any, options: dict, loops: Loops | None, memory: Any, **kwargs: Any
) -> Plan:
    """The plan of a call of `budgeted`; `args` and `kwargs` may be types."""
    from .program import RECOMPUTED, Program

    limit = parse_bytes(memory)
    planner, values = _planner(transform, f, args, kwargs, options, loops, {})
    chosen, compiles = planner.answer(limit)
    graph, default = (trace(lambda *values, c=c: planner.run(c, values), *values) for c in (chosen, planner.default))
    costs, default_costs = cost(graph), cost(default)
    name = f"{transform.__name__}({name_of(f)})"
    recomputed = [(row.path, row.eqn, 0, row.work.flops) for row in costs.rows if RECOMPUTED in row.path]
    saved, proposal = [], chosen.proposal
    if proposal.policy:
        joint = proposal.traced.joint
        makers = {v: (eqn, k) for eqn in joint.eqns for k, v in enumerate(eqn.outvars)}
        for v in Program(joint, proposal.policy).saved:
            outer = _jax.scopes(_jax.name_stack(makers[v][0]))
            calls, path = maker(*makers[v], outer, ("jit", "scan"))
            saved.append((path, calls[-1], nbytes(v.aval), 0.0))
    return Plan(
        name,
        limit if isinstance(limit, int) else int(limit * planner.default.bytes),
        planner.default.bytes,
        proposal.bytes,
        chosen.bytes,
        costs.flops,
        default_costs.flops,
        _parts(saved),
        _parts(recomputed),
        compiles,
        dataclasses.replace(graph, name=name),
    )


def _planner(
    transform: Callable, f: Callable, args: tuple, kwargs: dict, options: dict, loops: Any, planners: dict[Any, Planner]
) -> tuple[Planner, list[Any]]:
    """The planner for a call, and the traced leaves of the call."""
    from .candidates import Call
    from .planner import Planner, placed

    leaves, tree = tree_flatten((args, kwargs))
    is_array = lambda x: hasattr(x, "dtype") and not isinstance(x, type)
    is_traced = [is_array(x) or (isinstance(x, int | float | complex) and type(x) is not bool) for x in leaves]
    values = [x for x, ok in zip(leaves, is_traced, strict=True) if ok]
    static = [None if ok else x for x, ok in zip(leaves, is_traced, strict=True)]
    for x in static:
        if not isinstance(x, Hashable):
            raise ArgumentError(
                f"{transform.__name__} of {name_of(f)} with memory= takes arrays and hashable arguments, not {type(x).__name__}.",
                at=location(f),
                inputs=f"{x!r:.60}",
                hint="pass a tuple or a frozen dataclass, or close over it",
            )
    columns = static, map(type, static), map(_jax.type_of, values), map(placed, values)
    key = tree, *map(tuple, columns), _jax.trace_context()
    planner = planners.get(key) or Planner(transform, f, Call(tree, static, is_traced), values, options, loops)
    if not any(isinstance(c, jax.core.Tracer) for c in planner.consts):  # tracers belong to one enclosing trace
        planners[key] = planner
    return planner, values


def _parts(arrays: Iterable[tuple[Any, Any, int, float]]) -> tuple[Part, ...]:
    """The parts of (scope path, equation, bytes, FLOPs), grouped by scope, the largest first."""
    from .program import RECOMPUTED

    parts: dict[str, Part] = {}
    for path, eqn, size, flops in arrays:
        where = (
            "/".join(name for name in path if name not in (RECOMPUTED, BACKWARD))
            or _jax.line_of(eqn)
            or eqn.primitive.name
        )
        old = parts.get(where, Part(where, 0))
        parts[where] = Part(where, old.values + 1, old.bytes + size, old.flops + flops)
    return tuple(sorted(parts.values(), key=lambda p: (-p.bytes, -p.flops)))
