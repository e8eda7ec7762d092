"""`cost`: the work of a program as rows, one per equation, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
from jax.tree_util import tree_leaves, tree_unflatten

from ..core import _jax
from ..core.errors import ArgumentError, OptionError
from ..core.graph import Graph, trace
from ..core.report import Report, Result, Table
from ..core.scope_paths import BACKWARD, Path
from .backends import BACKENDS
from .device import Machine
from .formatting import format_bytes, format_count, format_seconds
from .inlining import Branches, Step, Unfolding, Value, leaves
from .live_memory import Timeline, simulated
from .operations import Work
from .trip_counts import Told, measured
from .xla_memory import temp_bytes

By = Literal["scope", "line", "primitive", "equation"]


@dataclass(frozen=True, slots=True)
class Row:
    """What an equation costs.

    Attributes:
      eqn: the equation, at any depth of sub-graphs.
      path: the scopes that it lies in, from the outside in; those of a backward pass stand behind "transpose".
      times: how often it runs, with the trips of all loops around it; a part of 1 in a branch.
      once: its work each time; None where it is unknown.
      parameters: how many parameters it is the first to read.
    """

    eqn: Any
    path: Path
    times: float
    once: Work | None
    parameters: int = 0

    @property
    def work(self) -> Work:
        """Its work, all times together; none where it is unknown."""
        once = self.once or Work()
        return once if self.times == 1 else once.times(self.times)

    @property
    def is_unknown(self) -> bool:
        """Whether it runs, and nobody knows what it costs."""
        return self.once is None and self.times > 0

    @property
    def scope(self) -> str:
        """Its scopes with slashes between them."""
        return "/".join(self.path)

    @property
    def line(self) -> str:
        """The user's line that made it, as "model.py:41 (attention)"; "" where Python does not know it."""
        return _jax.line_of(self.eqn) or ""

    @property
    def operation(self) -> str:
        """Its primitive and the type of its result, as "dot_general f32[8,64]"; of a kernel or foreign call the name."""
        outputs = " ".join(v.aval.str_short(short_dtypes=True) for v in self.eqn.outvars)
        return f"{_called(self.eqn)} {outputs}".rstrip()

    @property
    def is_backward(self) -> bool:
        """Whether it belongs to the backward pass of a gradient."""
        return BACKWARD in self.path


@dataclass(frozen=True, slots=True)
class Group:
    """What the equations of a scope, of a source line or of a primitive cost together.

    Attributes:
      name: of the scope and so on; `share` is the part of all FLOPs, or of all bytes where there are none.
      unknown: operations of unknown work, which come on top.
    """

    name: str
    work: Work
    parameters: int
    share: float
    unknown: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Cost(Result):
    """What a program costs. Its text is a table of scopes, sorted by share.

    Attributes:
      name: of the program.
      rows: one per equation that computes something, in program order, at any depth of sub-graphs.
      branches: for each `cond`, the work of each of its branches, and the weight with which it counts.
      endless: the loops of unknown length, as "scope/while" or the line; each counts as one trip.
    """

    name: str
    rows: tuple[Row, ...]
    branches: tuple[Branches, ...]
    endless: tuple[str, ...]
    program: tuple[list[Value], list[Step], list[Value]] = field(compare=False)

    @cached_property
    def work(self) -> Work:
        """FLOPs, transcendentals and bytes together; what is `unknown` comes on top."""
        return _sum(self.rows)

    @property
    def flops(self) -> float:
        """Arithmetic operations; a multiply-add is two."""
        return self.work.flops

    @property
    def transcendentals(self) -> float:
        """Evaluations of exp, log, tanh and their like, which are not among the FLOPs."""
        return self.work.transcendentals

    @property
    def bytes_read(self) -> float:
        """Bytes that equations read, each on its own."""
        return self.work.bytes_read

    @property
    def bytes_written(self) -> float:
        """Bytes that equations write, each on its own."""
        return self.work.bytes_written

    @property
    def parameters(self) -> int:
        """Numbers in the float arrays of the first argument that the program reads."""
        return sum(row.parameters for row in self.rows)

    @property
    def unknown(self) -> dict[str, int]:
        """Operations of unknown work by name, and how many equations there are of each."""
        return dict(Counter(_called(row.eqn) for row in self.rows if row.is_unknown))

    @property
    def forward(self) -> Cost:
        """The rows that do not belong to a backward pass; the timeline stays that of the whole program."""
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if not row.is_backward))

    @property
    def backward(self) -> Cost:
        """The rows that belong to a backward pass; the timeline stays that of the whole program."""
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if row.is_backward))

    def by(self, what: By = "scope", depth: int | None = None) -> list[Group]:
        """The rows folded together, the largest share first.

        Args:
          what: "scope", "line" of source, "primitive" or "equation".
          depth: of scopes, how many names count; None counts all.
        Raises:
          OptionError: there is no such way to fold. Also a ValueError.
        """
        keys: dict[str, Callable[[Row], str]] = {
            "scope": lambda row: "/".join(row.path[:depth]),
            "line": lambda row: row.line,
            "primitive": lambda row: _called(row.eqn),
            "equation": lambda row: f"{row.scope}/{row.operation}".lstrip("/"),
        }
        if what not in keys:
            raise OptionError(f"a cost is folded by one of {', '.join(keys)}, and not by {what!r}.")
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(keys[what](row), []).append(row)
        measure = (lambda w: w.flops) if self.flops else (lambda w: w.bytes)
        whole = measure(self.work) or 1
        found = []
        for name, rows in groups.items():
            work = _sum(rows)
            unknown = tuple(dict.fromkeys(_called(row.eqn) for row in rows if row.is_unknown))
            found.append(Group(name, work, sum(row.parameters for row in rows), measure(work) / whole, unknown))
        return sorted(found, key=lambda g: (-g.share, -g.work.bytes))

    def timeline(self) -> Timeline:
        """The live bytes over the program, and what is alive at the peak: scope, source line, shape."""
        return self._timeline

    @cached_property
    def _timeline(self) -> Timeline:
        return simulated(*self.program)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are alive at a time, arguments among them, if nothing is fused; see `timeline`."""
        return self.timeline().peak.live_bytes

    @cached_property
    def temp_bytes(self) -> int:
        """The bytes of temporaries that XLA is predicted to need on the default backend, as `memory_analysis` counts them.

        Arguments and results are not among them; loops hold a trip. TPUs count as GPUs. See `materialised` for the model.
        """
        _, steps, outputs = self.program
        return temp_bytes(steps, outputs, BACKENDS.get(jax.default_backend(), BACKENDS["gpu"]))

    def dict(self, depth: int | None = None) -> dict[str, Any]:
        """All of it as plain Python values, for JSON."""
        groups = {
            what: {g.name: dataclasses.asdict(g) for g in self.by(what, depth)}
            for what in ("scope", "line", "primitive")
        }
        return {
            "name": self.name,
            **dataclasses.asdict(self.work),
            "parameters": self.parameters,
            "peak_bytes": self.peak_bytes,
            "temp_bytes": self.temp_bytes,
            "unknown": self.unknown,
            "endless": list(self.endless),
            "forward": dataclasses.asdict(self.forward.work),
            "backward": dataclasses.asdict(self.backward.work),
            **groups,
        }

    def __repr__(self) -> str:
        total = f"{_amount(self.flops, 'FLOP', self.unknown)}, {format_bytes(self.work.bytes)}"
        return f"Cost({self.name}: {total}, {len(self.rows)} equations)"

    def report(
        self, by: By = "scope", depth: int | None = None, *, lines: int = 30, machine: Machine | None = None
    ) -> Report:
        """A table, sorted by share.

        Args:
          by, depth: what a line stands for, as in `by`.
          lines: fold the rest of a longer table.
          machine: adds the least time of each line on this machine, and what it is bound by.
        """
        peak = self.timeline().peak
        head = [
            f"{self.name}: {_amount(self.flops, 'FLOP', self.unknown)}, {format_count(self.transcendentals)} transcendentals, "
            f"{format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_written)} written, "
            f"{format_count(self.parameters)} parameters",
            f"peak {format_bytes(peak.live_bytes)} at {'/'.join(filter(None, (peak.scope, peak.primitive)))} {peak.line or ''}",
        ]
        if backward := self.backward.flops:
            head.append(f"forward {1 - backward / self.flops:.0%}, backward {backward / self.flops:.0%} of FLOPs")
        if self.unknown:
            head.append("unknown, on top: " + ", ".join(f"{name} ×{n}" for name, n in self.unknown.items()))
        if self.endless:
            head.append("loops of unknown length, as one trip: " + ", ".join(self.endless))
        roofline = ["time", "bound by"] if machine else []
        columns = ["share", "FLOP", "transc.", "read", "written", "params", *roofline, by]
        rows = [_cells(group, machine) for group in self.by(by, depth)]
        return Report((*map(str.rstrip, head), Table(rows, columns, ">" * (len(columns) - 1), limit=lines)))


def _cells(group: Group, machine: Machine | None) -> list[str]:
    work = group.work
    cells = [
        f"{group.share:.1%}",
        _amount(work.flops, "", group.unknown),
        format_count(work.transcendentals),
        format_bytes(work.bytes_read),
        format_bytes(work.bytes_written),
        format_count(group.parameters) if group.parameters else "",
    ]
    if machine:
        seconds, bound = machine.bound(work)
        cells += [format_seconds(seconds), bound]
    return [*cells, group.name or "-"]


def _amount(n: float, unit: str, unknown: Any) -> str:
    return ("≥ " if unknown else "") + format_count(n, unit)


def _sum(rows: Sequence[Row]) -> Work:
    return Work.sum(row.work for row in rows)


def _called(eqn: Any) -> str:
    """The name of the primitive, with that of the kernel or foreign function that it calls."""
    p, name = eqn.params, eqn.primitive.name
    inner = p.get("target_name")
    if name == "pallas_call":
        inner = p["name"] or p["jaxpr"].debug_info.func_name
    elif name == "call_hi_primitive":
        inner = type(p["_prim"]).__name__
    return f"{name}({inner})" if inner else name


# ------------------------------------------------------------------------------------------------ cost


def cost(
    f: Callable,
    /,
    *args: Any,
    trips: int | Mapping[str, int] | Literal["measured"] | None = None,
    probabilities: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    **kwargs: Any,
) -> Cost:
    """What a program costs: FLOPs, transcendentals, bytes, parameters and memory, by scope, source line and equation.

    A scan counts as often as it runs, a rematerialised value as often as it is computed, a `shard_map` on all of its devices, a
    Pallas kernel as its `cost_estimate` says. What has no rule is `unknown`, by name, and on top.
    What no output needs is left out.

    Args:
      f: function or Graph. A function is traced with `args` and `kwargs`, which may be `jax.ShapeDtypeStruct`; a Graph needs
        them only for trips="measured".
      trips: how often `while` loops run: a number for all, or scope pattern -> number, as in {"solver/while": 20}, or
        "measured": the program is run and its loops are counted. Loops of which nothing is known count as one trip.
      probabilities: how often the branches of a `cond` are taken, [of False, of True], for all or by scope pattern. Without
        them, the most expensive branch counts.
    Returns:
      Cost. Its text is a table of scopes; `timeline()` says what fills the memory.
    Raises:
      OptionError: a pattern names no loop or branch, or a `cond` has another number of branches. Also a ValueError.
      ArgumentError: the arguments cannot be traced, or for "measured" not run. Also a TypeError.

    >>> import jax.numpy as jnp
    >>> c = cost(lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 4)), jnp.ones((2, 3)))
    >>> c.flops, c.transcendentals, c.parameters
    (48, 8, 12)
    """
    if not callable(f):
        raise ArgumentError(f"cost takes a function or a Graph, and got {type(f).__name__}.", inputs=f"{f!r:.60}")
    graph = f if isinstance(f, Graph) else trace(f, *args, **kwargs)
    graph = dataclasses.replace(graph, jaxpr=_alive(graph.jaxpr))
    if isinstance(trips, str) and trips != "measured":
        raise OptionError(f'trips= takes a number, a mapping or "measured", and got {trips!r}.')
    if any(n < 0 for n in (trips.values() if isinstance(trips, Mapping) else [trips]) if isinstance(n, int | float)):
        raise OptionError(f"trips= takes numbers of at least 0, and got {trips!r}.")
    length = measured(graph, args, kwargs) if trips == "measured" else Told("trips", trips)
    chances = Told("probabilities", probabilities)

    def weights(eqn, path, count):
        given = chances(eqn, path)
        if given is not None and (len(given) != count or not math.isclose(sum(given), 1) or min(given) < 0):
            raise OptionError(
                f"probabilities= gives {list(given)} to a cond of {count} branches.",
                at=_jax.line_of(eqn),
                hint="one number per branch, which add up to 1; False is the first",
            )
        return given

    unfolding = Unfolding(length, weights)
    inputs, steps, outputs = unfolding.program(graph.jaxpr, graph.paths)
    if isinstance(length, Told):
        length.check(["/".join((*path, eqn.primitive.name)) for eqn, path in unfolding.loops])
    chances.check(["/".join((*b.path, "cond")) for b in unfolding.branches])
    return Cost(
        graph.name,
        tuple(_rows(steps, _parameters(graph, inputs))),
        tuple(unfolding.branches),
        tuple(
            dict.fromkeys(_jax.line_of(eqn) or "/".join((*path, eqn.primitive.name)) for eqn, path in unfolding.endless)
        ),
        (inputs, steps, outputs),
    )


def _alive(jaxpr: _jax.ClosedJaxpr) -> _jax.ClosedJaxpr:
    """What the outputs need, at any depth: XLA leaves out the rest too."""
    inner, _ = _jax.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return _jax.close(inner, jaxpr.consts)


def _parameters(graph: Graph, inputs: Sequence[Value]) -> set[Value]:
    """The float arrays of the first argument."""
    values = inputs[len(inputs) - len(graph.paths) :]
    args, _ = tree_unflatten(graph.in_tree, values)
    first = tree_leaves(args[0]) if args else []
    return {v for v in first if jax.dtypes.issubdtype(getattr(v.aval, "dtype", bool), jax.numpy.inexact)}


def _rows(steps: Sequence[Step], parameters: set[Value]) -> list[Row]:
    rows = []
    for step in leaves(steps):
        read = [v for v in dict.fromkeys(v.whole or v for v in step.reads) if v in parameters]
        parameters.difference_update(read)
        rows.append(Row(step.eqn, step.path, step.times, step.work, sum(math.prod(v.aval.shape) for v in read)))
    return rows
