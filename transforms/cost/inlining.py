"""A graph as what runs: calls opened, loops and branches with how often they run.

A `Step` is an equation with the values that it reads and makes. What only calls (jit, remat, custom derivatives) is
opened, and what only gives a value another shape is left out, so that a value is one object from where it is made to where it is
last read.
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

CONSTANT, NUMBER = "constant", "number"  # what is closed over, and literals
Trips = Callable[[Any, Path], float | None]
Weights = Callable[[Any, Path, int], Sequence[float] | None]


@dataclass(eq=False, slots=True)
class Value:
    """An array while the program runs.

    Attributes:
      aval, bytes: its type and size.
      maker, path: the equation that made it, and where that lies.
      argument: the path of an argument, CONSTANT or NUMBER.
      whole: the value outside of a loop that it is at first, or is a slice of.
    """

    aval: Any
    bytes: int
    maker: Any = None
    path: Path = ()
    argument: str | None = None
    whole: Value | None = None


@dataclass(eq=False, slots=True)
class Body:
    """A sub-graph of a step.

    Attributes:
      slices: inputs that have memory of their own; the others are values of the step.
      shared: values that are made in it, in the memory of the step's results.
      copies: how many run at the same time.
    """

    steps: list[Step]
    outputs: list[Value]
    slices: list[Value]
    shared: frozenset[Value]
    copies: int = 1


@dataclass(eq=False, slots=True)
class Step:
    """An equation that runs `times` times at `path`. Its work, done once, is None where it is unknown, or that of its bodies.

    `remat` is the outermost equation of a backward pass that computes it again, behind a barrier.
    """

    eqn: Any
    path: Path
    times: float
    reads: list[Value]
    makes: list[Value]
    work: Work | None = None
    bodies: list[Body] = field(default_factory=list)
    kept_bytes: int = 0  # what it holds inside while it runs
    remat: Any = None


@dataclass(frozen=True)
class Branches:
    """The work of each branch of a `cond`, run once, and the weight that each was given."""

    line: str | None
    path: Path
    work: tuple[Work, ...]
    weights: tuple[float, ...]


@dataclass
class Unfolding:
    """How loops and branches count, and what was found on the way.

    Attributes:
      trips: how often a loop runs; None where it is not known, which counts as one trip.
      weights: how often each branch is taken, in parts of 1; None for the most expensive one alone.
    """

    trips: Trips
    weights: Weights
    loops: list[tuple[Any, Path]] = field(default_factory=list)
    endless: list[tuple[Any, Path]] = field(default_factory=list)
    branches: list[Branches] = field(default_factory=list)

    def program(self, jaxpr: _jax.ClosedJaxpr, paths: Sequence[str]) -> tuple[list[Value], list[Step], list[Value]]:
        """The arguments and constants of a graph, its steps, and its outputs."""
        inner = jaxpr.jaxpr
        inputs = list(map(_constant, inner.constvars))
        inputs += [Value(v.aval, nbytes(v.aval), argument=p) for v, p in zip(inner.invars, paths, strict=True)]
        return inputs, *self.unfolded(inner, inputs, (), 1)

    def unfolded(self, jaxpr: Any, inputs: Sequence[Value], path: Path, times: float) -> tuple[list[Step], list[Value]]:
        """The steps and outputs of a jaxpr whose constants and inputs are `inputs`."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
        value = lambda v: known[v] if isinstance(v, _jax.Var) else Value(v.aval, nbytes(v.aval), argument=NUMBER)
        steps: list[Step] = []
        for eqn in jaxpr.eqns:
            path_of = joined(path, _jax.scopes(_jax.name_stack(eqn)))
            reads = list(map(value, eqn.invars))
            if is_view(eqn) or (eqn.primitive.name == "convert_element_type" and reads[0].argument == NUMBER):
                makes = reads
            elif eqn.primitive.name in _CALLS:
                body = subjaxprs.bodies(eqn)[0].jaxpr.jaxpr
                inner, makes = self.unfolded(body, [*map(_constant, body.constvars), *reads], path_of, times)
                if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
                    for step in inner:
                        step.remat = eqn
                steps += inner
            else:
                makes = [Value(v.aval, nbytes(v.aval), eqn, path_of) for v in eqn.outvars]
                steps.append(self._step(eqn, path_of, times, reads, makes))
            known.update(zip(eqn.outvars, makes, strict=False))
        return steps, list(map(value, jaxpr.outvars))

    def _step(self, eqn: Any, path: Path, times: float, reads: list[Value], makes: list[Value]) -> Step:
        """An equation that is no call."""
        name = eqn.primitive.name
        step = Step(eqn, path, times, reads, makes)
        bodies = [body.jaxpr for body in subjaxprs.bodies(eqn)]
        # What each input of a body is, and what it is at first or is a part of.
        given, wholes = (
            (subjaxprs.invariant_operands(eqn, reads), subjaxprs.operands(eqn, reads)) if bodies else ([], [])
        )
        if name in subjaxprs.SWEEPS:
            self._sweep(step)
        elif name == "scan":
            self._enter(step, bodies[0], times * eqn.params["length"], given[0], wholes[0])
            for stacked, one in zip(makes, step.bodies[0].outputs, strict=True):  # is what was made inside
                if one.maker is not None:
                    stacked.maker, stacked.path = one.maker, one.path
        elif name in subjaxprs.LOOPS:
            trips = self._trips(step)
            for body, n, inputs, parts in zip(bodies, (trips + 1, trips), given, wholes, strict=True):
                self._enter(step, body, times * (1 if math.isnan(trips) else n), inputs, parts)
        elif name == "cond":
            for body, inputs, parts in zip(bodies, given, wholes, strict=True):
                self._enter(step, body, 1, inputs, parts)
            self._weigh(step)
        elif name == "custom_linear_solve":
            self._enter(step, eqn.params["jaxprs"].solve, times)
        elif name == "shard_map":
            sizes = eqn.params["mesh"].shape
            shards = math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
            self._enter(step, bodies[0], times * shards, given[0], wholes[0], shards)
        else:
            step.work = work(eqn)
        return step

    def _enter(
        self,
        step: Step,
        jaxpr: Any,
        times: float,
        given: Sequence[Value | None] = (),
        wholes: Sequence[Value | None] = (),
        copies: int = 1,
    ) -> None:
        """Add a sub-graph to a step; `given` are values of the step among its inputs, `wholes` what these are parts of."""
        inner, name = jaxpr.jaxpr, step.eqn.primitive.name
        inputs = []
        for v, outer, whole in itertools.zip_longest(inner.invars, given, wholes):
            part = Value(v.aval, nbytes(v.aval), step.eqn, step.path, whole=whole and (whole.whole or whole))
            inputs.append(outer or part)
        slices = inputs[len(inputs) - subjaxprs.scan_sizes(step.eqn)[2] :] if name == "scan" else []
        steps, outputs = self.unfolded(inner, [*map(_constant, inner.constvars), *inputs], step.path, times)
        shared = () if name == "scan" or name in subjaxprs.LOOPS else outputs
        step.bodies.append(Body(steps, outputs, slices, frozenset(shared), copies))

    def _trips(self, step: Step) -> float:
        """How often a loop runs; NaN where nobody knows."""
        trips = self.trips(step.eqn, step.path)
        self.loops.append((step.eqn, step.path))
        if trips is None:
            self.endless.append((step.eqn, step.path))
        return math.nan if trips is None else trips

    def _weigh(self, step: Step) -> None:
        """How much each branch of a `cond` counts."""
        each = [total(body.steps) for body in step.bodies]
        platforms = step.eqn.params.get("branches_platforms")
        if platforms:  # JAX takes the first that fits where it compiles
            chosen = next(k for k, p in enumerate(platforms) if p is None or jax.default_backend() in p)
            weights: Sequence[float] = [int(k == chosen) for k in range(len(each))]
        else:
            most = max(range(len(each)), key=lambda k: (each[k].flops, each[k].transcendentals, each[k].bytes))
            told = self.weights(step.eqn, step.path, len(each))
            weights = [int(k == most) for k in range(len(each))] if told is None else told
        for body, weight in zip(step.bodies, weights, strict=True):
            _scale(body.steps, step.times * weight)
        self.branches.append(Branches(_jax.line_of(step.eqn), step.path, tuple(each), tuple(weights)))

    def _sweep(self, step: Step) -> None:
        """A loop of ours, forward, back or both: how often each of its parts runs, as `loops.driver` does it.

        A trip of a loop of unknown length counts as one of a long loop: a step forward, and again with residuals before its pull.
        """
        p, name = step.eqn.params, step.eqn.primitive.name
        sweep = p["sweep"].jvp(p["flags"]) if name == "tangent" else p["sweep"]
        is_forward, is_back = not p.get("has_checkpoints", False), name != "forward" and sweep.sizes[2] > 0
        n, size = self._trips(step), sweep.loops.residual_steps
        taped, again = 0.0, 1.0  # steps with residuals in the first run, and steps computed again
        if math.isnan(n):
            n = 1.0
        else:
            taped = min(n, size) if size > 1 and (is_back or name == "forward") else 0.0
            again = max(evaluations(math.ceil(n), sweep.loops) - n, 0.0)
        leaves_again = n if again else 0.0
        counts = {
            "hoist": 1.0,
            "cond": n * is_forward,
            "step": (n - taped) * is_forward + (again - leaves_again) * is_back,
            "fwd": taped * is_forward + leaves_again * is_back,
            "bwd": n * is_back,
        }
        for part, count in counts.items():
            self._enter(step, getattr(sweep, part), step.times * count, step.reads[: p["sweep"].sizes[0]])
        if is_back and is_forward:
            step.kept_bytes = sum(map(nbytes, jax.tree.leaves(Checkpoints.avals(sweep))))


def total(steps: Sequence[Step]) -> Work:
    """The work of steps, as often as they run; what is unknown is none."""
    return Work.sum(s.work.times(s.times) for s in leaves(steps) if s.work)


def leaves(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps at any depth that are not loops or branches themselves."""
    for step in steps:
        if step.bodies:
            for body in step.bodies:
                yield from leaves(body.steps)
        else:
            yield step


def _scale(steps: Sequence[Step], weight: float) -> None:
    for step in steps:
        step.times *= weight
        for body in step.bodies:
            _scale(body.steps, weight)


# Primitives that run their one sub-graph once, with their own operands.
_CALLS = frozenset(
    {"jit", "remat2", "closed_call", "call", "eval_jaxpr", "composite", "custom_vmap_call", "compute_on"}
)
_CALLS |= subjaxprs.WITH_DERIVATIVES


def _constant(v: Any) -> Value:
    return Value(v.aval, nbytes(v.aval), argument=CONSTANT)
