"""A graph as the equations that run: calls inlined, loops and branches with how often they run.

An `InlinedEqn` is an equation with the values that it reads and makes. Calls (jit, remat, custom derivatives) are replaced by
their bodies, and views by their operands. So a value is one object from the equation that makes it to the last one that reads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from ..core import _jax, subjaxprs
from ..core.scope_paths import Path, joined
from ..while_loops.checkpointed import Checkpoints
from ..while_loops.schedule import evaluations
from .operations import Work, is_view, nbytes, work

CONSTANT, NUMBER = "constant", "number"  # closed-over arrays, and literals
Trips = Callable[[Any, Path], float | None]
Weights = Callable[[Any, Path, int], Sequence[float] | None]


@dataclass(eq=False, slots=True)
class Value:
    """An array while the program runs.

    Attributes:
      aval, bytes: its type and size.
      maker, path: the equation that made it, and the scopes of that.
      argument: the path of an argument, CONSTANT or NUMBER; None for what an equation made.
      whole: the value outside of a loop that it is in the first iteration, or is a slice of.
    """

    aval: Any
    maker: Any = None
    path: Path = ()
    argument: str | None = None
    whole: Value | None = None
    bytes: int = field(init=False)

    def __post_init__(self):
        self.bytes = nbytes(self.aval)


@dataclass(eq=False, slots=True)
class Body:
    """A sub-jaxpr of an equation.

    Attributes:
      slices: inputs that have memory of their own; the others are values of the equation.
      shared: values that it makes in the memory of the equation's results.
      copies: how many run at the same time.
    """

    steps: list[InlinedEqn]
    outputs: list[Value]
    slices: list[Value]
    shared: frozenset[Value]
    copies: int = 1


@dataclass(eq=False, slots=True)
class InlinedEqn:
    """An equation that runs.

    Attributes:
      path: the scopes of the equation and of the calls around it.
      times: how often it runs; a part of 1 in a branch.
      work: of one run; None where it is unknown, or is that of its bodies.
      kept_bytes: what a loop holds for its backward pass while it runs.
      remat: the outermost equation of a backward pass that recomputes this one behind a barrier; None for others.
    """

    eqn: Any
    path: Path
    times: float
    reads: list[Value]
    makes: list[Value]
    work: Work | None = None
    bodies: list[Body] = field(default_factory=list)
    kept_bytes: int = 0
    remat: Any = None


@dataclass(frozen=True)
class Branches:
    """The work of one run of each branch of a `cond`, and the weight of each."""

    line: str | None
    path: Path
    work: tuple[Work, ...]
    weights: tuple[float, ...]


@dataclass
class Inlining:
    """How loops and branches count, and those that the program holds.

    Attributes:
      trips: how often a loop runs; None where it is not known, which counts as one trip.
      weights: how often each branch is taken, in parts of 1; None for the most expensive one alone.
      loops: "scope/while" and source line of each loop, and its trips.
      branches: those of each `cond`.
    """

    trips: Trips
    weights: Weights
    loops: list[tuple[str, str | None, float | None]] = field(default_factory=list)
    branches: list[Branches] = field(default_factory=list)

    def program(self, jaxpr: Any, paths: Sequence[str]) -> tuple[list[Value], list[InlinedEqn], list[Value]]:
        """The constants and arguments of a graph's jaxpr, its equations, and its outputs."""
        inputs = _constants(jaxpr)
        inputs += [Value(v.aval, argument=path) for v, path in zip(jaxpr.invars, paths, strict=True)]
        return inputs, *self.inlined(jaxpr, inputs, (), 1)

    def inlined(
        self, jaxpr: Any, inputs: Sequence[Value], path: Path, times: float
    ) -> tuple[list[InlinedEqn], list[Value]]:
        """The equations and outputs of a jaxpr whose constants and inputs are `inputs`."""
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
        read = lambda v: env[v] if isinstance(v, _jax.Var) else Value(v.aval, argument=NUMBER)
        steps: list[InlinedEqn] = []
        for eqn in jaxpr.eqns:
            eqn_path = joined(path, _jax.scopes(_jax.name_stack(eqn)))
            reads = list(map(read, eqn.invars))
            if is_view(eqn) or (eqn.primitive.name == "convert_element_type" and reads[0].argument == NUMBER):
                makes = reads
            elif eqn.primitive.name in subjaxprs.CALLS:
                body = subjaxprs.bodies(eqn)[0].jaxpr.jaxpr
                body_steps, makes = self.inlined(body, [*_constants(body), *reads], eqn_path, times)
                if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
                    for step in body_steps:
                        step.remat = eqn
                steps += body_steps
            else:
                makes = [Value(v.aval, eqn, eqn_path) for v in eqn.outvars]
                steps.append(InlinedEqn(eqn, eqn_path, times, reads, makes))
                self._add_work(steps[-1])
            env.update(zip(eqn.outvars, makes, strict=False))
        return steps, list(map(read, jaxpr.outvars))

    def _add_work(self, step: InlinedEqn) -> None:
        """The work of an equation that is no call, or its bodies with how often they run."""
        eqn, times = step.eqn, step.times
        name, bodies = eqn.primitive.name, [body.jaxpr for body in subjaxprs.bodies(eqn)]
        if bodies:
            invariants, wholes = subjaxprs.invariant_operands(eqn, step.reads), subjaxprs.operands(eqn, step.reads)
        if name in subjaxprs.SWEEPS:
            self._add_sweep(step)
        elif name == "scan":
            self._add_body(step, bodies[0], times * eqn.params["length"], invariants[0], wholes[0])
            for stacked, output in zip(step.makes, step.bodies[0].outputs, strict=True):
                if output.maker is not None:
                    stacked.maker, stacked.path = output.maker, output.path
        elif name in subjaxprs.LOOPS:
            trips = self._trips(step)
            for k, runs in enumerate((1, 1) if math.isnan(trips) else (trips + 1, trips)):  # of condition and body
                self._add_body(step, bodies[k], times * runs, invariants[k], wholes[k])
        elif name == "cond":
            for k, body in enumerate(bodies):
                self._add_body(step, body, 1, invariants[k], wholes[k])
            self._weigh(step)
        elif name == "custom_linear_solve":
            self._add_body(step, eqn.params["jaxprs"].solve, times)
        elif name == "shard_map":
            shards = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
            self._add_body(step, bodies[0], times * shards, invariants[0], wholes[0], shards)
        else:
            step.work = work(eqn)

    def _add_body(
        self,
        step: InlinedEqn,
        closed_jaxpr: Any,
        times: float,
        invariants: Sequence[Value | None] = (),
        wholes: Sequence[Value | None] = (),
        copies: int = 1,
    ) -> None:
        """Add a sub-jaxpr to an equation.

        Args:
          invariants: for each input the value of the equation that it always is; None for others.
          wholes: for each input the value that it is at first, or is a slice of; None for none.
        """
        jaxpr, name = closed_jaxpr.jaxpr, step.eqn.primitive.name
        inputs = [
            invariant or Value(v.aval, step.eqn, step.path, whole=whole and (whole.whole or whole))
            for v, invariant, whole in itertools.zip_longest(jaxpr.invars, invariants, wholes)
        ]
        slices = inputs[len(inputs) - subjaxprs.scan_sizes(step.eqn)[2] :] if name == "scan" else []
        steps, outputs = self.inlined(jaxpr, [*_constants(jaxpr), *inputs], step.path, times)
        shared = () if name == "scan" or name in subjaxprs.LOOPS else outputs
        step.bodies.append(Body(steps, outputs, slices, frozenset(shared), copies))

    def _trips(self, step: InlinedEqn) -> float:
        """How often a loop runs; NaN where that is unknown."""
        trips = self.trips(step.eqn, step.path)
        self.loops.append(("/".join((*step.path, step.eqn.primitive.name)), _jax.line_of(step.eqn), trips))
        return math.nan if trips is None else trips

    def _weigh(self, step: InlinedEqn) -> None:
        """Multiply the runs of each branch of a `cond` by its weight."""
        works = [total(body.steps) for body in step.bodies]
        weights: Sequence[float] | None = None
        platforms = step.eqn.params.get("branches_platforms")
        if platforms:  # JAX takes the first that fits where it compiles
            taken = next(k for k, p in enumerate(platforms) if p is None or jax.default_backend() in p)
        else:
            taken = max(range(len(works)), key=lambda k: (works[k].flops, works[k].transcendentals, works[k].bytes))
            weights = self.weights(step.eqn, step.path, len(works))
        if weights is None:
            weights = [int(k == taken) for k in range(len(works))]
        for body, weight in zip(step.bodies, weights, strict=True):
            _scale(body.steps, step.times * weight)
        self.branches.append(Branches(_jax.line_of(step.eqn), step.path, tuple(works), tuple(weights)))

    def _add_sweep(self, step: InlinedEqn) -> None:
        """The parts of a differentiated loop, forward, back or both, with how often `while_loops` runs each.

        A trip of a loop of unknown length counts as one of a long loop: a step forward, and again with residuals before its pull.
        """
        params, name = step.eqn.params, step.eqn.primitive.name
        sweep = params["sweep"].jvp(params["flags"]) if name == "tangent" else params["sweep"]
        is_forward, is_back = not params.get("has_checkpoints", False), name != "forward" and sweep.sizes[2] > 0
        n, size = self._trips(step), sweep.loops.residual_steps
        first_leaves, recomputed = 0.0, 1.0  # steps with residuals in the first run, and steps that run once more
        if math.isnan(n):
            n = 1.0
        else:
            first_leaves = min(n, size) if size > 1 and (is_back or name == "forward") else 0.0
            recomputed = max(evaluations(math.ceil(n), sweep.loops) - n, 0.0)
        later_leaves = n if recomputed else 0.0
        runs = {
            "hoist": 1.0,
            "cond": n * is_forward,
            "step": (n - first_leaves) * is_forward + (recomputed - later_leaves) * is_back,
            "fwd": first_leaves * is_forward + later_leaves * is_back,
            "bwd": n * is_back,
        }
        for part, count in runs.items():
            self._add_body(step, getattr(sweep, part), step.times * count, step.reads[: params["sweep"].sizes[0]])
        if is_back and is_forward:
            step.kept_bytes = sum(map(nbytes, jax.tree.leaves(Checkpoints.avals(sweep))))


def total(steps: Sequence[InlinedEqn]) -> Work:
    """The work of all runs of all equations; unknown work is left out."""
    return Work.sum(step.work.times(step.times) for step in leaves(steps) if step.work)


def leaves(steps: Sequence[InlinedEqn]) -> Iterator[InlinedEqn]:
    """The equations without bodies, at any depth."""
    for step in steps:
        if not step.bodies:
            yield step
        for body in step.bodies:
            yield from leaves(body.steps)


def _scale(steps: Sequence[InlinedEqn], weight: float) -> None:
    for step in steps:
        step.times *= weight
        for body in step.bodies:
            _scale(body.steps, weight)


def _constants(jaxpr: Any) -> list[Value]:
    return [Value(v.aval, argument=CONSTANT) for v in jaxpr.constvars]
