"""`Joint`: a gradient as one program of two parts.

    forward   the equations that no cotangent reaches: the function, and what its derivatives need of it
    backward  the others, from the cotangent of the result to those of the arguments, cut into *stages* where few bytes of
              cotangents are alive: in a network of layers, between the layers

A *node* is an equation of the forward part whose results have memory. Equations that XLA fuses into their readers belong to the
nodes that read them. A policy decides which nodes are saved for the backward part, and which its stages recompute.

Sources: Chen et al. 2016 (arXiv:1604.06174), where segments of the forward part are what stages are here; Checkmate (Jain et
al. 2020, arXiv:1910.02653), whose graph has one node per operation.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
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
from ..cost.xla_memory import materialised_eqns, temp_bytes
from .device_model import DeviceModel

COTANGENT = "funcgrad.cotangent"  # marks the cotangent of the result, where the backward part begins
VALUE = "funcgrad.value"  # marks the result of the forward part

# A stage that reads a larger part of the node bytes that the backward part reads is cut. Simulated seconds of 17 searches (see
# `saved_set`) with 1/16: 1.002, worst 1.03; with 1/64: 0.989, worst 1.10, and 1.5 times the CPU time.
MAX_STAGE_PART = 1 / 32


@jax.custom_vjp
def mark_cotangent(x: Any) -> Any:
    """The identity, for the result of the forward part. It marks the result and its cotangent."""
    return x


mark_cotangent.defvjp(
    lambda x: (checkpoint_name(x, VALUE), None), lambda _, cotangent: (checkpoint_name(cotangent, COTANGENT),)
)


class Node(NamedTuple):
    """An equation of the forward part whose results have memory.

    Attributes:
      at: its index among the equations.
      bytes: of its results, without those that the program returns.
      seconds: to compute it once on the device, with the equations fused into it.
      sources: the nodes that it reads.
      is_run: whether the forward part runs it, for the value or for effects, so that a stage computes it a second time.
      is_pinned: whether it is never recomputed: it has effects, or the program returns it.
      kind: equal for nodes of the same primitive and types.
    """

    at: int
    bytes: int
    seconds: float
    sources: tuple[int, ...]
    is_run: bool
    is_pinned: bool
    kind: Any


class Result(NamedTuple):
    """One of several results of a node: its bytes, the nodes that read it, and whether the backward part reads it."""

    bytes: int
    readers: set[int]
    is_read_back: bool


class Stage(NamedTuple):
    """Equations `start` to `stop` of the backward part, and the nodes that they read, each with the place of its last read."""

    start: int
    stop: int
    reads: dict[int, int]


class Joint:
    """A gradient in its two parts.

    Attributes:
      inputs, outvars: variables of the program. The first inputs are for its constants, which are in `consts`.
      eqns: its equations, the `split` ones of the forward part first.
      order: the place of each variable: inputs first, then results in program order.
      nodes: of the forward part, in program order; `node_of` maps a variable to its node.
      sources: maps a variable to the node results that it is computed from: itself, if a node computes it.
      results: of the nodes that have several.
      last_forward: the last node of the forward part that reads each node.
      stages: of the backward part; `whole` is all of it as one stage.
      inner_bytes: what each equation needs while it runs.
      forward_bytes: the live bytes at each node of the forward part, if nothing is saved.
      backward_bytes: the live bytes at each equation of the backward part, without nodes.
    """

    def __init__(
        self, closed: _jax.ClosedJaxpr, backend: Backend, device: DeviceModel, *, are_results_free: bool = True
    ):
        self.closed, self.device = closed, device
        marked, self.consts = flattened(closed, are_marks_kept=True)
        n = len(closed.jaxpr.outvars)
        jaxpr, _ = _jax.dce_jaxpr(marked, [k < n for k in range(len(marked.outvars))], instantiate=True)
        self.inputs, self.outvars = list(jaxpr.invars), list(jaxpr.outvars)
        # The forward part computes the value, even where the program does not return it: saved nodes lie on the way to it.
        needed = set(variables(marked.outvars))
        for eqn in reversed(_parts(marked.eqns)[0]):
            if eqn.effects or not needed.isdisjoint(eqn.outvars):
                needed.update(_operands(eqn))
        forward, backward = _parts(jaxpr.eqns)
        self.eqns, self.split = [*forward, *backward], len(forward)
        self.order = {v: k for k, v in enumerate([*self.inputs, *(v for eqn in self.eqns for v in eqn.outvars)])}
        outputs = set(variables(self.outvars))
        measured = [_work(eqn, backend) for eqn in self.eqns]
        self.inner_bytes = [size for _, size in measured]
        buffered = _buffered(jaxpr, backend)
        self._make_nodes(needed, outputs if are_results_free else set(), buffered, [work for work, _ in measured])
        self._make_stages(outputs, buffered)

    @cached_property
    def jaxpr(self) -> _jax.Jaxpr:
        """The program as it was traced, without marks."""
        return flattened(self.closed)[0]

    def _make_nodes(self, needed: set[Any], free: set[Any], buffered: set[int], works: Sequence[Work]) -> None:
        """Make the nodes; `free` variables take no temporary memory, `buffered` equations do."""
        self.nodes: list[Node] = []
        self.node_of: dict[Any, int] = {}
        self.sources: dict[Any, tuple[Any, ...]] = dict.fromkeys(self.inputs, ())
        readers: dict[Any, set[int]] = defaultdict(set)
        fused_s: dict[Any, float] = {}  # to compute a fused variable in its reader
        for at, eqn in enumerate(self.eqns[: self.split]):
            sources = self._sources_of(eqn)
            operands_s = sum(fused_s.get(v, 0.0) for v in _operands(eqn))
            if id(eqn) in buffered or eqn.effects:
                k, is_effect = len(self.nodes), bool(eqn.effects)
                for v in sources:
                    readers[v].add(k)
                self.node_of.update((v, k) for v in eqn.outvars)
                self.sources.update((v, (v,)) for v in eqn.outvars)
                node = Node(
                    at,
                    bytes=sum(nbytes(v.aval) for v in eqn.outvars if v not in free),
                    seconds=self.device.seconds(works[at]) + operands_s,
                    sources=tuple(dict.fromkeys(self.node_of[v] for v in sources)),
                    is_run=is_effect or not needed.isdisjoint(eqn.outvars),
                    is_pinned=is_effect or not free.isdisjoint(eqn.outvars),
                    kind=(eqn.primitive.name, *(v.aval.str_short() for v in (*eqn.outvars, *eqn.invars))),
                )
                self.nodes.append(node)
            else:
                self.sources.update(dict.fromkeys(eqn.outvars, sources))
                work = dataclasses.replace(works[at], bytes_read=0, bytes_written=0)
                fused_s.update((v, operands_s + self.device.seconds(work)) for v in eqn.outvars)
        read_back = {v for eqn in self.eqns[self.split :] for v in self._sources_of(eqn)}
        self.results: dict[int, list[Result]] = defaultdict(list)
        for v, k in self.node_of.items():
            if len(self.eqns[self.nodes[k].at].outvars) > 1 and v not in free:
                self.results[k].append(Result(nbytes(v.aval), readers[v], v in read_back))
        self.last_forward = list(range(len(self.nodes)))
        for k, node in enumerate(self.nodes):
            for source in node.sources:
                self.last_forward[source] = k
        values = ((k, last + 1, self.nodes[k].bytes * self.nodes[k].is_run) for k, last in enumerate(self.last_forward))
        inner_bytes = np.array([self.inner_bytes[node.at] for node in self.nodes], np.int64)
        self.forward_bytes = inner_bytes + live_bytes(values, len(self.nodes))

    def _sources_of(self, eqn: Any) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(s for v in _operands(eqn) for s in self.sources.get(v, ())))

    def _nodes_of(self, eqn: Any) -> Iterator[int]:
        return (self.node_of[v] for v in self._sources_of(eqn))

    def _make_stages(self, outputs: set[Any], buffered: set[int]) -> None:
        """Cut the backward part where the fewest bytes cross: those of cotangents, and of nodes that are read on both sides."""
        eqns = self.eqns[self.split :]
        born = {v: k for k, eqn in enumerate(eqns) for v in eqn.outvars}
        last = dict(born)
        for k in reversed(range(len(eqns))):
            # A fused equation runs in its readers, so its operands live as long as its results.
            run = k if id(eqns[k]) in buffered else max((last[v] for v in eqns[k].outvars), default=k)
            last.update((v, max(last[v], run)) for v in _operands(eqns[k]) if v in last)
        values = [(v, k, last[v] + 1, nbytes(v.aval)) for v, k in born.items() if v not in outputs]
        alive = live_bytes(((k, stop, size) for _, k, stop, size in values if id(eqns[k]) in buffered), len(eqns))
        self.backward_bytes = alive + np.array(self.inner_bytes[self.split :], np.int64)
        reads = [list(self._nodes_of(eqn)) for eqn in eqns]
        last_read = {node: k for k, nodes in enumerate(reads) for node in nodes}
        first_read = {node: k for k, nodes in reversed([*enumerate(reads)]) for node in nodes}
        crossing_values = [
            *((k + 1, stop, size) for _, k, stop, size in values),
            *((k + 1, last_read[node] + 1, self.nodes[node].bytes) for node, k in first_read.items()),
        ]
        crossing = live_bytes(crossing_values, len(eqns))  # before each equation
        new_bytes = np.zeros(len(eqns) + 1, np.int64)
        for node, k in first_read.items():
            new_bytes[k + 1] += self.nodes[node].bytes
        bytes_before = np.cumsum(new_bytes)  # of the nodes that are read before each equation
        cuts = [0, *_minima(crossing.tolist()), len(eqns)]
        cuts = sorted({p for a, b in pairwise(cuts) for p in (a, *_cuts(a, b, crossing, bytes_before))})
        stages = pairwise([*cuts, len(eqns)])
        self.stages = [Stage(a, b, {node: k for k in range(a, b) for node in reads[k]}) for a, b in stages]
        self.whole = Stage(0, len(eqns), last_read)


def live_bytes(values: Iterable[tuple[int, int, int]], length: int) -> np.ndarray:
    """The live bytes at each of `length` places, of values (start, stop, bytes) that are alive from start to before stop."""
    change = np.zeros(length + 1, np.int64)
    for start, stop, size in values:
        change[start] += size
        change[stop] -= size
    return np.cumsum(change[:-1])


def _minima(values: Sequence[int]) -> list[int]:
    """The first place of each local minimum, without the ends."""
    minima: list[int] = []
    start, is_falling = 0, False
    for k in range(1, len(values)):
        if values[k] != values[k - 1]:
            if values[k] > values[k - 1] and is_falling:
                minima.append(start)
            start, is_falling = k, values[k] < values[k - 1]
    return minima


def _cuts(start: int, stop: int, crossing: np.ndarray, bytes_before: np.ndarray) -> Iterator[int]:
    """The cuts of a stage that reads too many bytes: where the fewest bytes cross, in the middle half of those that it reads."""
    low, high = bytes_before[start], bytes_before[stop]
    if high - low <= bytes_before[-1] * MAX_STAGE_PART:
        return
    middle = [k for k in range(start + 1, stop) if abs(2 * bytes_before[k] - low - high) <= (high - low) / 2]
    if middle:
        cut = min(middle, key=crossing.__getitem__)
        yield from _cuts(start, cut, crossing, bytes_before)
        yield cut
        yield from _cuts(cut, stop, crossing, bytes_before)


# ------------------------------------------------------------------------------------------------ tracing


def flattened(jaxpr: _jax.ClosedJaxpr, *, are_marks_kept: bool = False) -> tuple[_jax.Jaxpr, list[Any]]:
    """A jaxpr without dead code, and with calls inlined where it is safe; and the constants, which are its first inputs.

    Marks are dropped. With `are_marks_kept`, the mark of the cotangent stays, and the marked values are additional last outputs.
    """
    flattening = Flattening(are_marks_kept)
    body = _jax.close(_jax.convert_constvars_jaxpr(jaxpr.jaxpr))
    stage = lambda *values: [*run(flattening, body, values), *flattening.marked]
    staged = _jax.stage_flat(stage, [v.aval for v in body.jaxpr.invars], _jax.no_names)
    whole = _jax.convert_constvars_jaxpr(staged.jaxpr)  # the constants of inlined calls
    live, _ = _jax.dce_jaxpr(whole, [True] * len(whole.outvars), instantiate=True)
    return live, [*staged.consts, *jaxpr.consts]


class Flattening(Pass):
    """Inlines calls where it is safe; drops marks, or collects the marked values."""

    def __init__(self, are_marks_kept: bool):
        self.are_marks_kept = are_marks_kept
        self.marked: list[Any] = []

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """A jit without placement or donation."""
        return subjaxprs.is_plain(eqn)

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """All that is entered."""
        return True

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The operand of a dropped mark; other equations as they are."""
        mark = mark_of(eqn)
        if mark == VALUE and self.are_marks_kept:
            self.marked.extend(values)
        is_dropped = mark == VALUE or (mark == COTANGENT and not self.are_marks_kept)
        return list(values) if is_dropped else bind(eqn, values)


def mark_of(eqn: Any) -> str:
    """The name that an equation gives its operand. Finished programs have no marks, because another gradient may enclose them."""
    return eqn.params["name"] if eqn.primitive.name == "name" else ""


def _parts(eqns: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The equations that no cotangent reaches, and the others.

    A cotangent reaches an equation by an operand, by a reference, or by the order of effects. Invariant: `reached` has all
    variables, references and ordered effects of the backward equations so far.
    """
    reached: set[Any] = set()
    parts: tuple[list[Any], list[Any]] = [], []
    for eqn in eqns:
        operands = _operands(eqn)
        ties = {v for v in operands if not _jax.is_array(v.aval)} | set(filter(_jax.is_ordered, eqn.effects))
        is_backward = mark_of(eqn) == COTANGENT or not reached.isdisjoint([*operands, *ties])
        if is_backward:
            reached.update(eqn.outvars, ties)
        parts[is_backward].append(eqn)
    return parts


def _inlined(jaxpr: Any) -> tuple[list[Any], list[Value]]:
    """The inlined equations of a jaxpr, and its outputs."""
    inlining = Inlining(lambda eqn, path: None, lambda eqn, path, count: None)
    arguments = [Value(v.aval, argument="") for v in jaxpr.invars]
    return inlining.inlined(jaxpr, arguments, (), 1)


def _work(eqn: Any, backend: Backend) -> tuple[Work, int]:
    """The work of an equation, and the bytes that it needs while it runs: of its bodies, operand copies and workspace."""
    jaxpr = SimpleNamespace(eqns=[eqn], constvars=(), invars=_operands(eqn), outvars=eqn.outvars)
    steps, results = _inlined(jaxpr)
    if subjaxprs.has_bodies(eqn.primitive):
        return total(steps), temp_bytes(steps, results, backend)
    return total(steps), copied_bytes(eqn, backend) + workspace_bytes(eqn, backend)


def _buffered(jaxpr: _jax.Jaxpr, backend: Backend) -> set[int]:
    """The ids of the equations whose results have memory: materialised ones, and all that have sub-jaxprs."""
    with_bodies = {id(eqn) for eqn in jaxpr.eqns if subjaxprs.has_bodies(eqn.primitive)}
    return materialised_eqns(*_inlined(jaxpr), backend) | with_bodies


def _operands(eqn: Any) -> list[Any]:
    return list(dict.fromkeys(variables(eqn.invars)))


def variables(atoms: Sequence[Any]) -> list[Any]:
    """The atoms that are no literals."""
    return [v for v in atoms if isinstance(v, _jax.Var)]
