"""A gradient as one program, in two parts: the equations that no cotangent reaches, and those that need one.

    forward   the function, and what its derivatives need of it
    backward  from the cotangent of the result to those of the arguments, cut into *stages* where few bytes of cotangents are
              alive: in a network of layers, between the layers

A *node* is an equation of the forward part whose results have memory; what XLA computes where it is read belongs to its
readers. Which nodes are kept for the backward part, and which are computed again in its stages, is what a budget decides.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ..core import _jax, subjaxprs
from ..core.pass_trace import bind
from ..core.passes import Pass, run
from ..cost.backends import Backend
from ..cost.inlining import Inlining, Value, total
from ..cost.library_calls import copied_bytes, workspace_bytes
from ..cost.operations import Work, nbytes
from ..cost.xla_memory import materialised, temp_bytes
from .device_model import Nominal

SEAM = "funcgrad.cotangent"  # where the backward part begins
VALUE = "funcgrad.value"  # what the forward part comes to


@jax.custom_vjp
def seam(x: Any) -> Any:
    """`x`, the result of the forward part; it and its cotangent are marked."""
    return x


seam.defvjp(lambda x: (checkpoint_name(x, VALUE), None), lambda _, cotangent: (checkpoint_name(cotangent, SEAM),))


MOST_STAGES = 32  # a stage that reads a larger part of what the backward part reads is cut


class Node(NamedTuple):
    """An equation of the forward part whose results have memory.

    Attributes:
      at: its place among the equations.
      bytes: of its results, those that the program returns left out.
      seconds: to compute it once more on a nominal machine, with what is computed where it reads.
      sources: the nodes that it reads.
      is_run: whether the value or other results of the forward part need it, so that in the backward part it is computed a
        second time.
      is_pinned: whether it is computed only once, for its effects, or is returned anyway.
      kind: equal for nodes that do the same.
    """

    at: int
    bytes: int
    seconds: float
    sources: tuple[int, ...]
    is_run: bool
    is_pinned: bool
    kind: Any


class Result(NamedTuple):
    """One of several results of a node: its bytes, the nodes that read it, and whether the backward part does."""

    bytes: int
    readers: set[int]
    is_read_back: bool


class Stage(NamedTuple):
    """Equations `start` to `stop` of the backward part, and of each node that they read the last place where they do."""

    start: int
    stop: int
    reads: dict[int, int]


class Joint:
    """A gradient in its two parts.

    Attributes:
      inputs, outvars: variables of the program; the first inputs are for what it closes over, which is in `consts`.
      eqns: its equations, the `split` ones of the forward part first.
      nodes: of the forward part, in program order; `node_of` a variable, `sources` the results of nodes that a variable is
        computed from, itself if it is one.
      results: of nodes with several.
      stages: of the backward part; `whole` is all of it as one.
      forward_bytes: what is alive at each node of the forward part, if nothing is kept.
      backward_bytes: what the backward part itself has alive at each of its equations.
    """

    def __init__(self, closed: _jax.ClosedJaxpr, backend: Backend, machine: Nominal, *, are_results_free: bool = True):
        self.closed, self.machine = closed, machine
        whole, self.consts = flattened(closed, are_marks_kept=True)
        n = len(closed.jaxpr.outvars)
        jaxpr, _ = _jax.dce_jaxpr(whole, [k < n for k in range(len(whole.outvars))], instantiate=True)
        self.inputs, self.outvars = list(jaxpr.invars), list(jaxpr.outvars)
        # Of a gradient alone too: what is kept lies on the way to the value, even where that is not returned.
        needed = set(variables(whole.outvars))
        for eqn in reversed(_parted(whole.eqns)[0]):
            if eqn.effects or not needed.isdisjoint(eqn.outvars):
                needed.update(_read(eqn))
        forward, backward = _parted(jaxpr.eqns)
        self.eqns, self.split = [*forward, *backward], len(forward)
        made = [v for eqn in self.eqns for v in eqn.outvars]
        self.order = {v: k for k, v in enumerate([*self.inputs, *made])}
        outputs = set(variables(self.outvars))
        measured = [_work(eqn, backend) for eqn in self.eqns]
        works, self.inner_bytes = [work for work, _ in measured], [size for _, size in measured]
        has_memory = _with_memory(jaxpr, backend)
        free = outputs if are_results_free else set[Any]()
        self._make_nodes(needed, free, has_memory, works)
        self._make_stages(outputs, has_memory)

    @cached_property
    def jaxpr(self) -> _jax.Jaxpr:
        """The program as it was traced, without marks."""
        return flattened(self.closed)[0]

    def _make_nodes(self, needed: set[Any], free: set[Any], has_memory: set[int], works: Sequence[Work]) -> None:
        self.nodes: list[Node] = []
        machine = self.machine
        self.node_of: dict[Any, int] = {}
        self.sources: dict[Any, tuple[Any, ...]] = dict.fromkeys(self.inputs, ())
        readers: dict[Any, set[int]] = defaultdict(set)
        drawn: dict[Any, float] = {}  # seconds of what is computed where it is read
        for at, eqn in enumerate(self.eqns[: self.split]):
            sources = self._sources_of(eqn)
            results = {v: (v,) for v in eqn.outvars}
            inside = sum(drawn.get(v, 0.0) for v in _read(eqn))
            if id(eqn) in has_memory or eqn.effects:
                size = sum(nbytes(v.aval) for v in eqn.outvars if v not in free)
                is_run = bool(eqn.effects) or any(v in needed for v in eqn.outvars)
                is_pinned = bool(eqn.effects) or any(v in free for v in eqn.outvars)
                kind = eqn.primitive.name, *(v.aval.str_short() for v in (*eqn.outvars, *eqn.invars))
                read = tuple(dict.fromkeys(self.node_of[v] for v in sources))
                for v in sources:
                    readers[v].add(len(self.nodes))
                self.node_of.update((v, len(self.nodes)) for v in eqn.outvars)
                self.nodes.append(Node(at, size, machine.seconds(works[at]) + inside, read, is_run, is_pinned, kind))
            else:
                results = dict.fromkeys(eqn.outvars, sources)
                fused = dataclasses.replace(works[at], bytes_read=0, bytes_written=0)
                drawn.update((v, inside + machine.seconds(fused)) for v in eqn.outvars)
            self.sources.update(results)
        read_back = {v for eqn in self.eqns[self.split :] for v in self._sources_of(eqn)}
        self.results: dict[int, list[Result]] = defaultdict(list)
        for v, k in self.node_of.items():
            if len(self.eqns[self.nodes[k].at].outvars) > 1 and v not in free:
                self.results[k].append(Result(nbytes(v.aval), readers[v], v in read_back))
        last = list(range(len(self.nodes)))
        for k, node in enumerate(self.nodes):
            for s in node.sources:
                last[s] = k
        alive = [0] * (len(self.nodes) + 1)
        for k, node in enumerate(self.nodes):
            alive[k] += self.inner_bytes[node.at]
            alive[k + 1] -= self.inner_bytes[node.at]
            alive[k] += node.bytes * node.is_run
            alive[last[k] + 1] -= node.bytes * node.is_run
        self.last_forward, self.forward_bytes = last, np.cumsum(alive[:-1])

    def _sources_of(self, eqn: Any) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(s for v in _read(eqn) for s in self.sources.get(v, ())))

    def _nodes_of(self, eqn: Any) -> Iterator[int]:
        return (self.node_of[v] for v in self._sources_of(eqn))

    def _make_stages(self, outputs: set[Any], has_memory: set[int]) -> None:
        """Cut the backward part where the fewest bytes are handed on: of cotangents, and of nodes that are read on both sides."""
        backward = self.eqns[self.split :]
        made = {v: k for k, eqn in enumerate(backward) for v in eqn.outvars}
        last = dict(made)
        for k in reversed(range(len(backward))):
            eqn = backward[k]
            # What is computed where it is read prolongs what it reads.
            when = k if id(eqn) in has_memory else max((last[v] for v in eqn.outvars), default=k)
            for v in _read(eqn):
                if v in last:
                    last[v] = max(last[v], when)
        alive = np.zeros(len(backward) + 1, np.int64)
        crossing = np.zeros(len(backward) + 1, np.int64)  # before each equation
        for v, k in made.items():
            if v not in outputs:
                size = nbytes(v.aval)
                if id(backward[k]) in has_memory:
                    alive[k] += size
                    alive[last[v] + 1] -= size
                crossing[k + 1] += size * (last[v] > k)
                crossing[last[v] + 1] -= size * (last[v] > k)
        self.backward_bytes = np.cumsum(alive[:-1]) + np.array(self.inner_bytes[self.split :], np.int64)
        first: dict[int, int] = {}
        final: dict[int, int] = {}
        read_bytes = np.zeros(len(backward), np.int64)  # of nodes, where each is read first
        for k, eqn in enumerate(backward):
            for s in self._nodes_of(eqn):
                first.setdefault(s, k)
                final[s] = k
        for s, k in first.items():
            crossing[k + 1] += self.nodes[s].bytes
            crossing[final[s] + 1] -= self.nodes[s].bytes
            read_bytes[k] += self.nodes[s].bytes
        crossing = np.cumsum(crossing)[:-1]
        read_before = np.concatenate([[0], np.cumsum(read_bytes)])
        cuts = [0, *_minima(crossing.tolist()), len(backward)]
        cuts = sorted({p for a, b in pairwise(cuts) for p in (a, *_halved(a, b, crossing, read_before))})
        self.stages: list[Stage] = []
        for start, stop in pairwise([*cuts, len(backward)]):
            reads = {s: k for k in range(start, stop) for s in self._nodes_of(backward[k])}
            self.stages.append(Stage(start, stop, reads))
        self.whole = Stage(0, len(backward), {s: k for stage in self.stages for s, k in stage.reads.items()})


def _minima(values: Sequence[int]) -> list[int]:
    """Where a sequence has a minimum: the first place of each, the ends left out."""
    found: list[int] = []
    start, falling = 0, False
    for k in range(1, len(values)):
        if values[k] != values[k - 1]:
            if values[k] > values[k - 1] and falling:
                found.append(start)
            start, falling = k, values[k] < values[k - 1]
    return found


def _halved(start: int, stop: int, crossing: np.ndarray, read_before: np.ndarray) -> Iterator[int]:
    """Where to cut a stage that reads more than a part of all bytes: where the fewest cross, in the middle half of them."""
    low, high = read_before[start], read_before[stop]
    if high - low <= read_before[-1] / MOST_STAGES:
        return
    middle = [k for k in range(start + 1, stop) if abs(2 * read_before[k] - low - high) <= (high - low) / 2]
    if middle:
        cut = min(middle, key=crossing.__getitem__)
        yield from _halved(start, cut, crossing, read_before)
        yield cut
        yield from _halved(cut, stop, crossing, read_before)


# ------------------------------------------------------------------------------------------------ tracing


def flattened(jaxpr: _jax.ClosedJaxpr, *, are_marks_kept: bool = False) -> tuple[_jax.Jaxpr, list[Any]]:
    """A jaxpr without dead code and without calls that mean nothing but their bodies, and the constants it takes first.

    Marks are dropped, those of other gradients inside; or of one gradient kept, and then the value that has one comes last.
    """
    inner, p = jaxpr.jaxpr, _Flattening(are_marks_kept)
    avals = [v.aval for v in (*inner.constvars, *inner.invars)]
    body = _jax.close(_jax.convert_constvars_jaxpr(inner))
    flat = _jax.stage_flat(lambda *values: [*run(p, body, values), *p.marked], avals, _jax.no_names)
    whole = _jax.convert_constvars_jaxpr(flat.jaxpr)  # constants of calls, which are not calls any more
    live, _ = _jax.dce_jaxpr(whole, [True] * len(whole.outvars), instantiate=True)
    return live, [*flat.consts, *jaxpr.consts]


class _Flattening(Pass):
    """Calls that mean nothing but their bodies stand as these; marks are dropped or collected."""

    def __init__(self, are_marks_kept: bool):
        self.are_marks_kept = are_marks_kept
        self.marked: list[Any] = []

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """A jit that places and donates nothing."""
        return subjaxprs.is_plain(eqn)

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """All that is entered."""
        return True

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The operand of a mark that is dropped; other equations as they are."""
        mark = mark_of(eqn)
        if mark == VALUE and self.are_marks_kept:
            self.marked.extend(values)
        is_dropped = mark == VALUE or (mark == SEAM and not self.are_marks_kept)
        return list(values) if is_dropped else bind(eqn, values)


def mark_of(eqn: Any) -> str:
    """The name that an equation gives its operand. No program has marks in the end: other gradients may be around it."""
    return eqn.params["name"] if eqn.primitive.name == "name" else ""


def _parted(eqns: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Those that no cotangent reaches, and those that one does: by their operands, by references, or by the order of effects."""
    reached: set[Any] = set()
    parts: tuple[list[Any], list[Any]] = [], []
    for eqn in eqns:
        touched = {v for v in _read(eqn) if not _jax.is_array(v.aval)} | set(filter(_jax.is_ordered, eqn.effects))
        is_backward = mark_of(eqn) == SEAM or not reached.isdisjoint([*_read(eqn), *touched])
        if is_backward:
            reached.update(eqn.outvars, touched)
        parts[is_backward].append(eqn)
    return parts


class _Alone(NamedTuple):
    """An equation as a jaxpr."""

    eqns: list[Any]
    invars: list[Any]
    constvars: Sequence[Any] = ()
    outvars: Sequence[Any] = ()


def _inlining() -> Inlining:
    return Inlining(lambda eqn, path: None, lambda eqn, path, count: None)


def _work(eqn: Any, backend: Backend) -> tuple[Work, int]:
    """The work of an equation, and the bytes that it needs inside: of its bodies, of copies of its operands, to work in."""
    read = _read(eqn)
    steps, results = _inlining().inlined(_Alone([eqn], read, outvars=eqn.outvars), [_argument(v) for v in read], (), 1)
    if subjaxprs.has_bodies(eqn.primitive):
        return total(steps), temp_bytes(steps, results, backend)
    return total(steps), copied_bytes(eqn, backend) + workspace_bytes(eqn, backend)


def _with_memory(jaxpr: _jax.Jaxpr, backend: Backend) -> set[int]:
    """The ids of the equations whose results have memory; of those that hold functions, all."""
    steps, results = _inlining().inlined(jaxpr, [_argument(v) for v in jaxpr.invars], (), 1)
    opened = {id(eqn) for eqn in jaxpr.eqns if subjaxprs.has_bodies(eqn.primitive)}
    return materialised(steps, results, backend) | opened


def _argument(v: Any) -> Value:
    return Value(v.aval, argument="")


def _read(eqn: Any) -> list[Any]:
    return list(dict.fromkeys(variables(eqn.invars)))


def variables(atoms: Sequence[Any]) -> list[Any]:
    """Those of some atoms that are no literals."""
    return [v for v in atoms if isinstance(v, _jax.Var)]
