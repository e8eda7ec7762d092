"""`Planner`: the cheapest program within a budget, compiled and measured.

For one function and arguments of one type, a planner keeps every program that it has compiled, with the bytes that XLA reports.
A budget is answered by the cheapest of them that fits, after at most `COMPILES` new ones; one or two more, the plainest and the
smallest program, where none fits. A smaller budget never gets a bigger program.

The loop over proposals is a secant method on the simulated bytes: each compile gives the error of the simulation near the
budget, and the next target is the budget less this error.

Source: Checkmate (Jain et al. 2020, arXiv:1910.02653) solves once on a model of memory, and allows for its errors by a margin.
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
from ..core.errors import ArgumentError, BudgetError, OptionError, location
from ..core.passes import run
from ..core.rules import live
from ..core.signatures import name_of
from ..cost.backends import BACKENDS
from ..cost.formatting import format_bytes
from ..while_loops.primitives import rules as reversible
from ..while_loops.schedule import Loops
from .candidates import Call, Candidate, Config, Proposal, TracedGradient
from .device_model import DEVICE_MODELS
from .joint import Joint, flattened, mark_cotangent
from .policy import Policy
from .program import Program
from .saved_set import MIN_SECONDS, Search, everything
from .scan_bodies import PlannedScans, Scan, ScanPolicy

COMPILES = 4  # programs that are compiled for a new budget, as docs/budgets.md promises

# Set by hand on the models of benchmarks/budgets.py; their neighbours were not compared.
PROPOSALS = 10  # proposals for a budget, most of which were compiled before
TARGET_STEP = 0.03  # of the target, after a proposal that was compiled before, or none
CEILING_MARGIN = 0.95  # of a target that gave no fitting program: no steps from there on
MISS_MARGIN = (
    0.985  # of the budget, the target after a miss; with 1.0, the MLP within 75 to 27 % gets the same programs
)
MISS_GROWTH = 1.25  # of the largest error so far, the error that a cautious proposal allows for
LAST_MARGIN = 0.9  # of a cautious target, with one compile left
FULL = 0.98  # of the budget: a program that takes more is not improved on
MAX_TARGET = 1.1  # of the budget: a program may take less than simulated
MAX_BIAS = 0.05  # of simulated to compiled bytes, in the first target
LOOPS = tuple(Loops(c, s) for c, s in ((32, 16), (16, 8), (8, 4), (4, 2), (2, 1), (1, 1)))  # the fastest first

SHARD_MAP_HINT = "; a shard_map is saved or recomputed as a whole: use jax.checkpoint inside it to save less"


class Planner:
    """The programs of one derivative of one function, for calls of one type.

    Args:
      transform: maps a function to its derivative, as `jax.grad`.
      f: the function.
      call, values: one of its calls, and the traced leaves of it, arrays or types.
      options: of the transform.
      loops: how `while` loops run; None leaves it to the budget.
    """

    def __init__(
        self, transform: Callable, f: Callable, call: Call, values: Sequence[Any], options: dict, loops: Loops | None
    ):
        self.transform, self.f, self.call, self.options, self.loops = transform, f, call, options, loops

        def flat(*values):
            args, kwargs = call.arguments(values)
            leaves, self.primal_tree = tree_flatten(f(*args, **kwargs))
            _check_returned(f, leaves)
            return leaves

        closed = _jax.stage(f, *call.arguments(values), values, flat)
        _check_surroundings(transform, f, closed, values)
        self.flat, self.consts = flattened(closed)
        self.shardings = [*map(placed, self.consts), *map(placed, values)]
        platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
        self.backend, self.device = BACKENDS[platform], DEVICE_MODELS[platform]
        self.traced: dict[Config, TracedGradient] = {}
        self.candidates: list[Candidate] = []
        self.answers: dict[float, Candidate | None] = {}
        self.has_last_resorts = False  # whether the plainest and the smallest program were compiled

    # ------------------------------------------------------------------------------------------------ programs

    @cached_property
    def scans(self) -> dict[int, Scan]:
        """The scans of the function that have policies to choose from, by the index of their equation."""
        eqns = [(k, eqn) for k, eqn in enumerate(self.flat.eqns) if eqn.primitive.name == "scan" and not eqn.effects]
        eqns = [(k, eqn) for k, eqn in eqns if eqn.params["length"] > 1 and not _has_loops(eqn.params["jaxpr"].jaxpr)]
        scans = {k: Scan(eqn, self.backend, self.device) for k, eqn in eqns}
        return {k: scan for k, scan in scans.items() if scan.policies != [scan.default]}

    @cached_property
    def has_loops(self) -> bool:
        """Whether the function has a `while` loop, at any depth."""
        return _has_loops(self.flat)

    def trace(self, config: Config) -> TracedGradient:
        """The joint program of a configuration."""
        if config not in self.traced:
            policies = zip(self.scans.items(), config.scans, strict=True) if config.scans else ()
            planned = PlannedScans({id(self.flat.eqns[k]): (scan, policy) for (k, scan), policy in policies})
            results: list[Any] = []

            def flat(*values):
                consts, values = values[: len(self.consts)], values[len(self.consts) :]

                def f(*args, **kwargs):
                    out = run(planned, _jax.close(self.flat), [*consts, *self.call.values(args, kwargs)])
                    out = tree_unflatten(self.primal_tree, out)
                    if not self.options["has_aux"]:
                        return mark_cotangent(out)
                    is_pair = isinstance(out, tuple) and len(out) == 2  # if not, JAX raises
                    return (mark_cotangent(out[0]), out[1]) if is_pair else out

                args, kwargs = self.call.arguments(values)
                f = live(f, reversible(config.loops)) if self.has_loops else f
                leaves, tree = tree_flatten(self.transform(f, **self.options)(*args, **kwargs))
                is_array = [getattr(x, "dtype", None) != float0 for x in leaves]
                empty = [None if ok else np.zeros(x.shape, float0) for x, ok in zip(leaves, is_array, strict=True)]
                results[:] = [tree, empty]
                return [x for x, ok in zip(leaves, is_array, strict=True) if ok]

            closed = _jax.stage_flat(flat, [v.aval for v in self.flat.invars], _jax.no_names)
            joint = Joint(closed, self.backend, self.device)
            self.traced[config] = TracedGradient(config, joint, Search(joint), *results)
        return self.traced[config]

    @cached_property
    def default(self) -> Candidate:
        """The program without a budget."""
        traced = self.trace(Config((), self.loops or Loops()))
        outcome = traced.search.simulate(Policy(everything(traced.joint)), 0)
        scans_s = sum(scan.default.seconds for scan in self.scans.values())
        return self._compiled(Proposal(traced, None, scans_s + outcome.seconds, outcome.peak))

    def _compiled(self, proposal: Proposal) -> Candidate:
        joint = proposal.traced.joint
        if proposal.policy:
            whole = Program(joint, proposal.policy).whole
            program = jax.jit(lambda *values: whole(values))
        else:
            program = jax.jit(_jax.jaxpr_as_fun(_jax.close(joint.jaxpr)))
        shardings = [*map(placed, joint.consts), *self.shardings]
        structs = [_struct(v.aval, sharding) for v, sharding in zip(joint.inputs, shardings, strict=True)]
        analysis: Any = program.lower(*structs).compile().memory_analysis()
        candidate = Candidate(proposal, int(analysis.temp_size_in_bytes), program)
        self.candidates.append(candidate)
        return candidate

    def run(self, candidate: Candidate, values: Sequence[Any]) -> Any:
        """The results of a program for the traced leaves of a call."""
        traced = candidate.proposal.traced
        leaves = iter(candidate.program(*traced.joint.consts, *self.consts, *values))
        return tree_unflatten(traced.tree, [next(leaves) if x is None else x for x in traced.constants])

    # ------------------------------------------------------------------------------------------------ budgets

    def answer(self, limit: int | float) -> tuple[Candidate, int]:
        """The program within `limit` bytes, or a part of the default's, and the number of programs compiled for it."""
        n_compiled = len(self.candidates)
        limit = limit if isinstance(limit, int) else limit * self.default.bytes
        if candidate := self.within_budget(limit):
            return candidate, len(self.candidates) - n_compiled
        size, default_bytes = self.smallest_bytes, self.default.bytes
        has_shard_maps = any(eqn.primitive.name == "shard_map" for eqn in self.flat.eqns)
        error = BudgetError(
            f"{self.transform.__name__} of {name_of(self.f)} needs more than {format_bytes(limit)} of temporaries: "
            f"the smallest program that is always found takes {format_bytes(size)}.",
            at=location(self.f),
            inputs=f"without a budget {format_bytes(default_bytes)}; {len(self.candidates)} programs were compiled",
            hint=f"memory={size}, a smaller batch, or parts of it one after the other{SHARD_MAP_HINT * has_shard_maps}",
        )
        error.smallest = size
        raise error

    def within(self, limit: float) -> Candidate | None:
        """The cheapest compiled program that fits, in bytes between the answers to smaller and to bigger budgets."""
        least = max((c.bytes for budget, c in self.answers.items() if c and budget <= limit), default=0)
        most = min((c.bytes for budget, c in self.answers.items() if c and budget >= limit), default=limit)
        fitting = (c for c in self.candidates if least <= c.bytes <= min(limit, most))
        return min(fitting, key=lambda c: c.proposal.seconds, default=None)

    def within_budget(self, limit: float) -> Candidate | None:
        """The answer to a budget, None if nothing fits. An answer stays."""
        if limit not in self.answers:
            self.answers[limit] = self._planned(limit)
        self.answers[limit] = self.answers[limit] or self.within(limit)  # other budgets may have compiled one since
        return self.answers[limit]

    def _planned(self, limit: float) -> Candidate | None:
        """`within` a budget, after new programs were compiled.

        Invariants: `remaining` compiles are left, `latest` is the last one. `target` is in simulated bytes; targets from
        `ceiling` on gave programs that do not fit.
        """
        if self.default.bytes <= limit:
            return self.default
        remaining, latest = COMPILES - 1, None  # the default counts for the first budget
        target, ceiling = limit * self._bias(limit), limit * MAX_TARGET
        for _ in range(PROPOSALS):
            best, compiled = self.within(limit), self._compiled_bytes
            is_cautious = bool(latest and not best)
            proposal = self._cautious(limit, remaining) if is_cautious else self._proposed(target)
            if proposal is None:
                if latest or best or target > ceiling:
                    break
                target *= 1 + TARGET_STEP
            elif proposal.key in compiled:
                if compiled[proposal.key] > limit:
                    ceiling, target = target, target * (1 - TARGET_STEP)
                elif target > ceiling * CEILING_MARGIN:
                    break
                else:
                    target *= 1 + TARGET_STEP
            elif best and proposal.seconds >= best.proposal.seconds:
                break
            else:
                latest, remaining = self._compiled(proposal), remaining - 1
                if not remaining or (FULL * limit <= latest.bytes <= limit and not is_cautious):
                    break
                target = limit + proposal.bytes - latest.bytes
                target *= MISS_MARGIN if latest.bytes > limit else 1.0
        # With one compile left, the program that is predicted to be the smallest comes first.
        for name in ("plainest", "smallest") if remaining > 1 else ("smallest", "plainest"):
            proposal = None if self.within(limit) else getattr(self, name)
            if proposal and proposal.key not in self._compiled_bytes:
                self._compiled(proposal)
        self.has_last_resorts = self.has_last_resorts or not self.within(limit)
        return self.within(limit)

    @property
    def _compiled_bytes(self) -> dict[Any, int]:
        return {c.proposal.key: c.bytes for c in self.candidates}

    def _cautious(self, limit: float, remaining: int) -> Proposal | None:
        """The cheapest proposal that fits if the simulation errs as it did; of a search, or one that saves between segments.

        With one compile remaining, it allows for larger errors. None leaves the remaining compiles to the last resorts.
        """
        error = self._largest_error(limit, [c for c in self.candidates if c.proposal.policy])
        searched = self._proposed((limit - error) * MISS_MARGIN * (LAST_MARGIN if remaining == 1 else 1.0))
        if remaining == 1 or not (searched or self.has_last_resorts):
            return searched
        plain = {p.key for p in self._between_segments(math.inf)}
        error = self._largest_error(limit, [c for c in self.candidates if c.proposal.key in plain])
        proposals = [*filter(None, [searched]), *self._between_segments(min(limit * FULL, limit - error))]
        proposals = [p for p in proposals if p.key not in self._compiled_bytes]
        return min(proposals, key=lambda p: p.seconds, default=None)

    def _largest_error(self, limit: float, candidates: Sequence[Candidate]) -> float:
        """The largest error of the simulation among candidates that do not fit, grown if it is positive."""
        error = max((c.bytes - c.proposal.bytes for c in candidates if c.bytes > limit), default=0)
        return error * (MISS_GROWTH if error > 0 else 1.0)

    @property
    def smallest_bytes(self) -> int:
        """The bytes of the smallest program that every planner of this function finds, for any budget."""
        keys = {p.key for p in (self.smallest, self.plainest) if p}
        return min([self.default.bytes, *(size for key, size in self._compiled_bytes.items() if key in keys)])

    def _bias(self, limit: float) -> float:
        """The ratio of simulated to compiled bytes, for the program closest to a limit."""
        closest = min(self.candidates, key=lambda c: abs(c.bytes - limit))
        ratio = closest.proposal.bytes / closest.bytes if closest.bytes else 1.0
        return min(max(ratio, 1 - MAX_BIAS), 1 + MAX_BIAS)

    @cached_property
    def plainest(self) -> Proposal | None:
        """The proposal with the lowest peak that saves only between segments."""
        return min(self._between_segments(math.inf), key=lambda p: p.bytes, default=None)

    def _between_segments(self, limit: float) -> list[Proposal]:
        """Proposals that save only between segments, as one writes by hand: XLA adds the fewest bytes to these."""
        traced = self.smallest.traced if self.scans and self.smallest else self.default.proposal.traced
        scans_s = sum(policy.seconds for policy in traced.config.scans)
        starts = ((start, traced.search.simulate(start, 0)) for start in traced.search.starts[1:])
        return [Proposal(traced, start, scans_s + o.seconds, o.peak) for start, o in starts if o.peak <= limit]

    def _proposed(self, target: float) -> Proposal | None:
        """The cheapest program within so many simulated bytes."""
        proposals = []
        front = [scan.policies for scan in self.scans.values()]
        for loops in [self.loops or Loops()] if self.loops or not self.has_loops else LOOPS:
            room, feasible = target, 0
            # Invariant: scans take at most `room`, from the cheapest policies on, until twice the rest of the program fits too.
            while feasible < 2:
                scans = _cheapest(front, room)
                traced = self.trace(Config(tuple(scans), loops))
                best = traced.search.best(target)
                if best:
                    policy, outcome = best
                    seconds = sum(scan.seconds for scan in scans) + outcome.seconds
                    proposals.append(Proposal(traced, policy, seconds, outcome.peak))
                    feasible += 1
                used = sum(scan.bytes for scan in scans)
                if not scans or used >= room:
                    break
                room = used - max(1.0, 0 if best else (traced.search.lowest - target) / 2)
            if proposals:
                break
        return min(proposals, key=lambda p: p.seconds, default=None)

    @cached_property
    def smallest(self) -> Proposal | None:
        """The proposal with the lowest peak, by bisection to 3 %. Invariant: `low` is infeasible, `high` is not."""
        low, high, best = 0.0, float(self.default.proposal.bytes), None
        while high - low > high / 32:
            middle = (low + high) / 2
            if proposal := self._proposed(middle):
                best, high = proposal, min(middle, proposal.bytes)
            else:
                low = middle
        return best


def _cheapest(fronts: Sequence[Sequence[ScanPolicy]], limit: float) -> list[ScanPolicy]:
    """A policy for each scan, together within a limit if they can.

    Greedy: from the cheapest policies, each step takes the move along a front that frees the most bytes per second. Then each
    scan in turn takes the cheapest policy that fits beside the others.
    """
    at = [0] * len(fronts)
    while sum(front[k].bytes for front, k in zip(fronts, at, strict=True)) > limit:
        moves = []
        for i, k in enumerate(at):
            for j in range(k + 1, len(fronts[i])):
                old, new = fronts[i][k], fronts[i][j]
                moves.append(((old.bytes - new.bytes) / (max(new.seconds - old.seconds, 0) + MIN_SECONDS), i, j))
        if not moves:
            break
        _, i, j = max(moves)
        at[i] = j
    for i, front in enumerate(fronts):
        room = limit - sum(fronts[j][k].bytes for j, k in enumerate(at) if j != i)
        at[i] = next((k for k in range(at[i]) if front[k].bytes <= room), at[i])
    return [front[k] for front, k in zip(fronts, at, strict=True)]


def _check_returned(f: Callable, leaves: Sequence[Any]) -> None:
    for x in leaves:
        try:
            jax.typeof(x)
        except TypeError:
            raise ArgumentError(
                f"{name_of(f)} returned {type(x).__name__}, which is not an array: with memory=, the function is traced.",
                at=location(f),
                inputs=f"{x!r:.60}",
                hint="return arrays, in any tree; None is an empty one",
            ) from None


def _check_surroundings(transform: Callable, f: Callable, closed: Any, values: Sequence[Any]) -> None:
    """Refuse references, and mapped axes from outside: the program is compiled by itself."""
    verb = f"{transform.__name__} of {name_of(f)} with memory="
    if not all(_jax.is_array(v.aval) for v in (*closed.jaxpr.constvars, *closed.jaxpr.invars)):
        hint = "create the reference inside the function, and return its value"
        raise ArgumentError(f"{verb} takes no references, and closes over none.", at=location(f), hint=hint)
    axes = {e.name for e in closed.jaxpr.effects if isinstance(e, _jax.NamedAxisEffect)} | manual_axes.varying(values)
    if axes:
        raise OptionError(
            f"{verb} cannot be compiled inside a function that is mapped over {', '.join(sorted(map(repr, axes)))}.",
            at=location(f),
            hint="differentiate the function that calls shard_map or vmap, and pass memory= there",
        )


def _has_loops(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "while" or any(_has_loops(body.jaxpr.jaxpr) for body in subjaxprs.bodies(eqn))
        for eqn in jaxpr.eqns
    )


def placed(x: Any) -> Any:
    """The sharding of a committed array or of a type; None for others."""
    is_placed = not isinstance(x, jax.core.Tracer) and getattr(x, "committed", isinstance(x, jax.ShapeDtypeStruct))
    return getattr(x, "sharding", None) if is_placed else None


def _struct(aval: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=getattr(aval, "weak_type", False))
