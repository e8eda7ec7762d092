"""Planning: programs within a budget, compiled and measured.

For one function and arguments of one type, a `Planner` keeps every program that it has compiled, with its measured bytes. A
budget is answered by the cheapest of them that fits, after at most `COMPILES` more have been tried; one or two more, the
plainest and the smallest, where none of these fits. Of budgets that are asked for one after the other, a smaller one gets no
bigger program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.dtypes import float0
from jax.tree_util import tree_flatten, tree_unflatten

from ..core import _jax, manual_axes, subjaxprs
from ..core.errors import ArgumentError, OptionError, location
from ..core.pass_trace import bind
from ..core.passes import Pass, run
from ..core.rules import live
from ..core.signatures import name_of
from ..cost.backends import BACKENDS
from ..while_loops.primitives import rules as reversible
from ..while_loops.schedule import Loops
from .candidates import Call, Candidate, Config, Proposal, Traced
from .device_model import NOMINAL
from .joint import Joint, flattened, seam
from .program import Emission
from .scan_bodies import Option, Scan
from .search import TINY_S, Search, everything
from .simulation import Choice

COMPILES = 4  # for a new budget
PROPOSALS = 10  # most of which are known
MISSED = 0.985  # of a budget, what is aimed at after a miss
MISSING = 1.25  # of what predictions missed, what the next may miss
LAST = 0.9  # of what is aimed at after a miss, what is aimed at with one compile left
CLOSE = 0.98  # a program that fills so much of its budget is not improved on
MOST = 1.1  # of a budget, what is aimed at: a program may take less than simulated
LADDER = tuple(Loops(c, s) for c, s in ((32, 16), (16, 8), (8, 4), (4, 2), (2, 1), (1, 1)))


class Planner:
    """The programs of one derivative of one function, for calls of one type.

    Args:
      transform: from a function to its derivative, as `jax.grad`.
      f: the function.
      call, values: one of its calls, and what of that is traced, arrays or types.
      options: of the transform.
      loops: how `while` loops run; None leaves it to the budget.
    """

    def __init__(
        self,
        transform: Callable,
        f: Callable,
        call: Call,
        values: Sequence[Any],
        options: dict,
        loops: Loops | None,
    ):
        self.transform, self.call, self.options, self.loops = transform, call, options, loops
        outputs: list[Any] = []

        def flat(*values):
            args, kwargs = call.arguments(values)
            leaves, tree = tree_flatten(f(*args, **kwargs))
            _check_returned(f, leaves)
            outputs[:] = [tree]
            return leaves

        closed = _jax.stage(f, *call.arguments(values), values, flat)
        _check_surroundings(transform, f, closed, values)
        (self.primal_tree,) = outputs
        self.flat, self.consts = flattened(closed)
        self.shardings = [*map(placed, self.consts), *map(placed, values)]
        platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
        self.backend, self.machine = BACKENDS[platform], NOMINAL[platform]
        self.traced: dict[Config, Traced] = {}
        self.candidates: list[Candidate] = []
        self.answers: dict[float, Candidate | None] = {}
        self.has_lasts = False  # whether the plainest and the smallest program were compiled

    # ------------------------------------------------------------------------------------------------ what may be planned

    @cached_property
    def scans(self) -> dict[int, Scan]:
        """The scans of the function, by their places, with what can be chosen for each."""
        found = {k: eqn for k, eqn in enumerate(self.flat.eqns) if eqn.primitive.name == "scan" and not eqn.effects}
        plain = {k: eqn for k, eqn in found.items() if not _has_loops(eqn.params["jaxpr"].jaxpr)}
        scans = {k: Scan(eqn, self.backend, self.machine) for k, eqn in plain.items() if eqn.params["length"] > 1}
        return {k: scan for k, scan in scans.items() if len(scan.options) > 1 or scan.options[0] != scan.default}

    @cached_property
    def has_loops(self) -> bool:
        """Whether a `while` loop is part of the function, at any depth."""
        return _has_loops(self.flat)

    def trace(self, config: Config) -> Traced:
        """The joint program of a configuration."""
        if config not in self.traced:
            options = dict(zip(self.scans, config.scans, strict=True)) if config.scans else {}
            planned = {id(self.flat.eqns[k]): (self.scans[k], option) for k, option in options.items()}

            results: list[Any] = []

            p = _WithScans(planned)

            def flat(*values):
                consts, values = values[: len(self.consts)], values[len(self.consts) :]

                def f(*args, **kwargs):
                    out = run(p, _jax.close(self.flat), [*consts, *self.call.values(args, kwargs)])
                    out = tree_unflatten(self.primal_tree, out)
                    if not self.options["has_aux"]:
                        return seam(out)
                    is_pair = isinstance(out, tuple) and len(out) == 2  # if not, JAX says what is wrong
                    return (seam(out[0]), out[1]) if is_pair else out

                args, kwargs = self.call.arguments(values)
                f = live(f, reversible(config.loops)) if self.has_loops else f
                leaves, tree = tree_flatten(self.transform(f, **self.options)(*args, **kwargs))
                is_array = [getattr(x, "dtype", None) != float0 for x in leaves]
                empty = [None if ok else np.zeros(x.shape, float0) for x, ok in zip(leaves, is_array, strict=True)]
                results[:] = [tree, empty]
                return [x for x, ok in zip(leaves, is_array, strict=True) if ok]

            closed = _jax.stage_flat(flat, [v.aval for v in self.flat.invars], _jax.no_names)
            joint = Joint(closed, self.backend, self.machine)
            self.traced[config] = Traced(config, joint, Search(joint), *results)
        return self.traced[config]

    @cached_property
    def default(self) -> Candidate:
        """The program that computes nothing again but what the function itself says."""
        traced = self.trace(Config((), self.loops or Loops()))
        outcome = traced.search.simulate(Choice(everything(traced.joint)), 0)
        kept_s = sum(scan.default.seconds for scan in self.scans.values())
        return self._compiled(Proposal(traced, None, kept_s + outcome.seconds, outcome.peak))

    def _compiled(self, proposal: Proposal) -> Candidate:
        traced, choice, seconds, predicted = proposal
        joint = traced.joint
        if choice:
            whole = Emission(joint, choice).whole
            program = jax.jit(lambda *values: whole(values))
        else:
            program = jax.jit(_jax.jaxpr_as_fun(_jax.close(joint.jaxpr)))
        shardings = [*map(placed, joint.consts), *self.shardings]
        structs = [_struct(v.aval, sharding) for v, sharding in zip(joint.inputs, shardings, strict=True)]
        analysis: Any = program.lower(*structs).compile().memory_analysis()
        size = int(analysis.temp_size_in_bytes)
        candidate = Candidate(traced, choice, seconds, predicted, size, program)
        self.candidates.append(candidate)
        return candidate

    # ------------------------------------------------------------------------------------------------ budgets

    def within(self, limit: float) -> Candidate | None:
        """The cheapest program found whose temporaries fit in so many bytes.

        It takes no less than what a smaller budget got, and no more than what a bigger one got.
        """
        least = max((c.bytes for budget, c in self.answers.items() if c and budget <= limit), default=0)
        most = min((c.bytes for budget, c in self.answers.items() if c and budget >= limit), default=limit)
        fitting = (c for c in self.candidates if least <= c.bytes <= min(limit, most))
        return min(fitting, key=lambda c: c.seconds, default=None)

    def within_budget(self, limit: float) -> Candidate | None:
        """The cheapest program found within so many bytes; None if none fits. A budget's program stays."""
        if limit not in self.answers:
            self.answers[limit] = self._found(limit)
        self.answers[limit] = self.answers[limit] or self.within(limit)  # of what other budgets had compiled since
        return self.answers[limit]

    def _found(self, limit: float) -> Candidate | None:
        """`within` so many bytes, after some more programs were compiled."""
        if self.default.bytes <= limit:
            return self.default
        left, made = COMPILES - 1, None  # the default is one of the first budget's
        aim, ceiling = limit * self._bias(limit), limit * MOST
        for _ in range(PROPOSALS):
            best, tried = self.within(limit), {c.key: c for c in self.candidates}
            is_sure = bool(made and not best)
            proposal = self._sure(limit, left) if is_sure else self._propose(aim)
            if proposal is None:
                if made or best or aim > ceiling:
                    break
                aim *= 1.03
                continue
            if proposal.key in tried:
                if tried[proposal.key].bytes > limit:
                    ceiling, aim = aim, aim * 0.97
                elif aim > ceiling * 0.95:
                    break
                else:
                    aim *= 1.03
                continue
            if best and proposal.seconds >= best.seconds:
                break
            made, left = self._compiled(proposal), left - 1
            if not left or (CLOSE * limit <= made.bytes <= limit and not is_sure):
                break
            aim = limit + made.predicted_bytes - made.bytes
            aim *= MISSED if made.bytes > limit else 1.0
        lasts = [lambda: self.plainest, lambda: self.smallest]
        for last in lasts if left > 1 else reversed(lasts):  # with one left, what is predicted to take the least
            proposal = None if self.within(limit) else last()
            if proposal and proposal.key not in {c.key for c in self.candidates}:
                self._compiled(proposal)
        self.has_lasts = self.has_lasts or not self.within(limit)
        return self.within(limit)

    def _sure(self, limit: float, left: int) -> Proposal | None:
        """The cheapest program that fits also if predictions miss by as much as they did, or what XLA adds the least to.

        None if the compiles that are left are for the last ones. With one left, it fits also if predictions miss by more.
        """
        aim = (limit - self._missed(limit, [c for c in self.candidates if c.choice])) * MISSED
        searched = self._propose(aim * (LAST if left == 1 else 1.0))
        if left == 1 or not (searched or self.has_lasts):
            return searched
        plain = {p.key for p in self._between_segments(math.inf)}
        missed = self._missed(limit, [c for c in self.candidates if c.key in plain])
        found = [*filter(None, [searched]), *self._between_segments(min(limit * CLOSE, limit - missed))]
        tried = {c.key for c in self.candidates}
        return min((p for p in found if p.key not in tried), key=lambda p: p.seconds, default=None)

    def _missed(self, limit: float, candidates: Sequence[Candidate]) -> float:
        """By how much those of some candidates that do not fit took more than predicted, at most, and a margin."""
        missed = max((c.bytes - c.predicted_bytes for c in candidates if c.bytes > limit), default=0)
        return missed * (MISSING if missed > 0 else 1.0)

    @property
    def smallest_bytes(self) -> int:
        """Of the smallest program that is found for every budget, also by another planner."""
        found = {p.key for p in (self.smallest, self.plainest) if p}
        return min([self.default.bytes, *(c.bytes for c in self.candidates if c.key in found)])

    def run(self, candidate: Candidate, values: Sequence[Any]) -> Any:
        """What a program returns for what is traced of a call."""
        traced = candidate.traced
        leaves = iter(candidate.program(*traced.joint.consts, *self.consts, *values))
        return tree_unflatten(traced.tree, [next(leaves) if x is None else x for x in traced.constants])

    def _bias(self, limit: float) -> float:
        """By how much simulated bytes differ from compiled ones, for the program next to a limit."""
        near = min(self.candidates, key=lambda c: abs(c.bytes - limit))
        return min(max(near.predicted_bytes / near.bytes, 0.95), 1.05) if near.bytes else 1.0

    @cached_property
    def plainest(self) -> Proposal | None:
        """Of the programs that keep only what lies between segments, the one with the smallest peak."""
        return min(self._between_segments(math.inf), key=lambda p: p.bytes, default=None)

    def _between_segments(self, aim: float) -> list[Proposal]:
        """Programs that keep only what lies between segments, as one does by hand: XLA adds the least to these."""
        traced = self.smallest.traced if self.scans and self.smallest else self.default.traced
        again = sum(option.seconds for option in traced.config.scans)
        starts = ((start, traced.search.simulate(start, 0)) for start in traced.search.starts[1:])
        return [Proposal(traced, start, again + o.seconds, o.peak) for start, o in starts if o.peak <= aim]

    def _propose(self, aim: float) -> Proposal | None:
        """The cheapest program of so many simulated bytes."""
        found = []
        options = [scan.options for scan in self.scans.values()]
        for loops in [self.loops or Loops()] if self.loops or not self.has_loops else LADDER:
            room, feasible = aim, 0
            # From the cheapest way to run the scans on, until the rest of the program has room too; and one way more.
            while feasible < 2:
                scans = _cheapest(options, room)
                traced = self.trace(Config(tuple(scans), loops))
                best = traced.search.best(aim)
                if best:
                    choice, outcome = best
                    again = sum(option.seconds for option in scans) + outcome.seconds
                    found.append(Proposal(traced, choice, again, outcome.peak))
                    feasible += 1
                used = sum(option.bytes for option in scans)
                if not scans or used >= room:
                    break
                room = used - max(1.0, 0 if best else (traced.search.lowest - aim) / 2)
            if found:
                break
        return min(found, key=lambda p: p.seconds, default=None)

    @cached_property
    def smallest(self) -> Proposal | None:
        """The program with the smallest peak that is found by halving."""
        low, high, best = 0.0, float(self.default.predicted_bytes), None
        while high - low > high / 32:
            middle = (low + high) / 2
            if found := self._propose(middle):
                best, high = found, min(middle, found.bytes)
            else:
                low = middle
        return best


def _cheapest(options: Sequence[Sequence[Option]], limit: float) -> list[Option]:
    """An option for each scan, together within a limit if they can: from the cheapest on, by what saves the most per second."""
    at = [0] * len(options)
    while sum(o[k].bytes for o, k in zip(options, at, strict=True)) > limit:
        moves = []
        for i, k in enumerate(at):
            for further in range(k + 1, len(options[i])):
                here, there = options[i][k], options[i][further]
                moves.append(((here.bytes - there.bytes) / (max(there.seconds - here.seconds, 0) + TINY_S), i, further))
        if not moves:
            break
        _, i, further = max(moves)
        at[i] = further
    for i, o in enumerate(options):
        room = limit - sum(other[k].bytes for j, (other, k) in enumerate(zip(options, at, strict=True)) if j != i)
        at[i] = next((k for k in range(at[i]) if o[k].bytes <= room), at[i])
    return [o[k] for o, k in zip(options, at, strict=True)]


def _check_returned(f: Callable, leaves: Sequence[Any]) -> None:
    for x in leaves:
        try:
            jax.typeof(x)
        except TypeError:
            raise ArgumentError(
                f"{name_of(f)} returned {type(x).__name__}, which is no array: with memory= it is traced.",
                at=location(f),
                inputs=f"{x!r:.60}",
                hint="return arrays, in any tree; None is an empty one",
            ) from None


def _check_surroundings(transform: Callable, f: Callable, closed: Any, values: Sequence[Any]) -> None:
    """Refuse what cannot be compiled by itself."""
    verb = f"{transform.__name__} of {name_of(f)} with memory="
    if not all(_jax.is_array(v.aval) for v in (*closed.jaxpr.constvars, *closed.jaxpr.invars)):
        hint = "make the reference inside of the function, and return what it holds"
        raise ArgumentError(f"{verb} takes no references, and closes over none.", at=location(f), hint=hint)
    axes = {e.name for e in closed.jaxpr.effects if isinstance(e, _jax.NamedAxisEffect)} | manual_axes.varying(values)
    if axes:
        raise OptionError(
            f"{verb} cannot be compiled inside of what maps it over {', '.join(sorted(map(repr, axes)))}.",
            at=location(f),
            hint="differentiate the function that holds the shard_map or the vmap, with memory= there",
        )


def _has_loops(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "while" or any(_has_loops(body.jaxpr.jaxpr) for body in subjaxprs.bodies(eqn))
        for eqn in jaxpr.eqns
    )


def placed(x: Any) -> Any:
    """The sharding of an array that is committed to one, or of a type that has one; else None."""
    is_placed = not isinstance(x, jax.core.Tracer) and getattr(x, "committed", isinstance(x, jax.ShapeDtypeStruct))
    return getattr(x, "sharding", None) if is_placed else None


def _struct(aval: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=getattr(aval, "weak_type", False))


class _WithScans(Pass):
    """Replaces scans by their planned forms, found by the identity of the equation."""

    def __init__(self, planned: dict[int, tuple[Scan, Any]]):
        self.planned = planned

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Sub-jaxprs stay as they are."""
        return False

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """A planned scan, or the equation as it is."""
        if id(eqn) not in self.planned:
            return bind(eqn, values)
        scan, option = self.planned[id(eqn)]
        return scan.run(option, values)
