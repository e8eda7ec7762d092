"""What a backend keeps in memory: `temp_bytes`, a prediction of XLA's temporaries from the jaxpr, before anything is compiled.

XLA fuses operations into kernels, and only what one kernel hands to another has memory. The model is its fusion pass, its
buffer assignment and its loops, each in a few rules:

- What computes each element on its own is computed where it is read, as often as it is read. It is *materialised*, that
  is, has memory, where a library call reads it (product, convolution, reduction, sort …), and where it is expensive (exp, tanh …) and
  has several readers.
- What is read inside a fusion stays alive until the last kernel that it is fused into.
- A kernel writes over an operand of the same size that dies with it.
- A product or convolution whose operands lie in an order of axes that the library does not take reads a copy.
- Outputs lie in the caller's memory. A loop holds its carry and its stacks outside of its body, and updates them in place.

Sources: XLA's `instruction_fusion.cc` (what is expensive, what is duplicated), `buffer_assignment.cc` and
`heap_simulator.cc`, and the buffers that `--xla_dump_to` lists for the programs of tests/trainings.py.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .operations import nbytes
from .steps import NUMBER, Step, Value

_CHEAP = """add sub add_any neg mul square max min sign abs floor ceil round eq ne lt le gt ge and or xor not is_finite select_n
clamp convert_element_type reduce_precision shift_left shift_right_logical shift_right_arithmetic integer_pow real imag complex
copy copy_p broadcast_in_dim broadcast_to iota transpose rev pad slice split dynamic_slice gather
population_count clz eq_to lt_to le_to conj one_minus_square"""
_EXPENSIVE = """div rem exp exp2 expm1 log log1p log2 sqrt rsqrt cbrt pow sin cos tan asin acos atan atan2 sinh cosh tanh asinh
acosh atanh erf erfc logistic nextafter erf_inv"""
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor"
_ABSORBED = """add sub add_any neg mul square max min abs integer_pow exp tanh div sqrt rsqrt log broadcast_in_dim
convert_element_type dot_general reduce_sum reduce_max"""
_MOVING = frozenset("broadcast_in_dim broadcast_to transpose rev pad slice split dynamic_slice gather".split())  # noqa: SIM905


@dataclass(frozen=True)
class Backend:
    """What one backend fuses.

    Attributes:
      cheap: computed where it is read, however often.
      expensive: computed where it is read, once.
      reductions: library calls that compute what they read themselves, if nobody else reads it.
      absorbed: what they compute so, and how many operations.
    """

    cheap: frozenset[str]
    expensive: frozenset[str]
    reductions: frozenset[str]
    absorbed: frozenset[str]
    limit: int


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BACKENDS = {
    "cpu": Backend(_names(_CHEAP), _names(_EXPENSIVE), _names(_REDUCTIONS), _names(_ABSORBED), 74),
    "gpu": Backend(_names(f"{_CHEAP} {_EXPENSIVE}"), _names(""), _names(_REDUCTIONS), _names(_ABSORBED), 74),
}


def temp_bytes(steps: Sequence[Step], outputs: Sequence[Value], backend: Backend) -> int:
    """The most bytes that temporaries of a program have at a time."""
    return _Run(steps, outputs, backend).peak()


@dataclass(eq=False, slots=True)
class Kernel:
    """One value and how it comes about: a kernel of its own, if it is materialised.

    Attributes:
      at: its place in the order of the program; after `schedule`, a whole number.
      reads: the kernels whose results it reads; arguments are not among them.
      readers: the kernels that read it.
      last: when its result is read last; `through`: when it is computed last inside others.
    """

    name: str
    bytes: int
    count: int
    reads: list[Kernel]
    step: Step | None = None
    is_cheap: bool = False
    remat: Any = None
    readers: list[Kernel] = field(default_factory=list)
    is_output: bool = False
    is_materialised: bool = True
    cluster: Kernel | None = None
    is_grown: bool = False
    size: int = 1
    at: int = 0
    last: int = -1
    through: int = -1


class _Run:
    """Steps as kernels."""

    def __init__(self, steps: Sequence[Step], outputs: Sequence[Value], backend: Backend):
        self.backend = backend
        self.kernels: list[Kernel] = []
        self.of: dict[Value, Kernel] = {}
        self.known: dict[Any, list[Kernel]] = {}
        for step in steps:
            self._add(step)
        for v in outputs:
            if v in self.of:
                self.of[v].is_output = True
        self._fuse()
        self._schedule()
        self._live()

    def _add(self, step: Step) -> None:
        """The kernels of a step; none, if the same is computed before it."""
        eqn, name = step.eqn, step.eqn.primitive.name
        same = _same(step)
        if same is not None:
            if same in self.of:
                self.of[step.makes[0]] = self.of[same]
            return
        reads = [self._operand(step, k) for k in range(len(step.reads))]
        key = None
        if name in self.backend.cheap | self.backend.expensive | self.backend.reductions:
            words = [id(r) if isinstance(r, Kernel) else r for r in reads]
            key = name, *words, step.remat and id(step.remat), str(eqn.params), str(eqn.outvars[0].aval)
        if key is None or key not in self.known:
            sources = list(dict.fromkeys(r for r in reads if isinstance(r, Kernel)))
            is_cheap = name in self.backend.cheap or (name in ("div", "rem") and step.reads[1].argument == NUMBER)
            self.known[key] = [
                self._kernel(Kernel(name, v.bytes, _count(v.aval), sources, step, is_cheap, step.remat))
                for v in step.makes
            ]
        self.of.update(zip(step.makes, self.known[key], strict=True))

    def _kernel(self, kernel: Kernel) -> Kernel:
        for k in kernel.reads:
            k.readers.append(kernel)
        self.kernels.append(kernel)
        return kernel

    def _operand(self, step: Step, k: int) -> Any:
        """The kernel that makes an operand, as the step reads it: of the result's shape, in the library's order of axes."""
        v, atom = step.reads[k], step.eqn.invars[k]
        source: Any = str(atom.val) if v.argument == NUMBER and hasattr(atom, "val") else self.of.get(v, id(v))
        name, out = step.eqn.primitive.name, step.eqn.outvars[0].aval
        order = _order(step.eqn, k)
        if order is not None and _moves(order, atom.aval.shape):
            return self._moved("transpose", source, atom.aval, step, (atom.aval.shape, tuple(order)))
        is_elementwise = (name in self.backend.cheap or name in self.backend.expensive) and name not in _MOVING
        if is_elementwise and getattr(atom.aval, "shape", ()) != out.shape:
            return self._moved("broadcast_in_dim", source, out.update(dtype=atom.aval.dtype), step, out.shape)
        return source

    def _moved(self, name: str, source: Any, aval: Any, step: Step, how: Any) -> Kernel:
        """A copy or a broadcast of an operand, made as soon as that is there."""
        remat = step.remat and id(step.remat)
        is_known = isinstance(source, Kernel)
        key = name, id(source) if is_known else source, how, remat
        if key not in self.known:
            reads = [source] if is_known else []
            self.known[key] = [self._kernel(Kernel(name, nbytes(aval), _count(aval), reads, None, True, step.remat))]
        return self.known[key][0]

    # ------------------------------------------------------------------------------------------------ fusion

    def _fuses(self, k: Kernel, reader: Kernel) -> bool:
        """Whether `reader` computes `k` itself."""
        if reader.remat is not None and k.remat is not reader.remat:  # behind its barrier
            return False
        if reader.cluster:
            return k.cluster is reader.cluster
        if not (k.is_cheap or k.name in self.backend.expensive):
            return False
        if not (reader.is_cheap or reader.name in self.backend.expensive):
            return False
        return k.is_cheap or (len(k.readers) == 1 and reader.name not in _MOVING)

    def _join(self, k: Kernel) -> None:
        """The library call that computes `k`."""
        clusters = {r.cluster for r in k.readers}
        if len(clusters) == 1 and not k.is_output and k.name in self.backend.absorbed:
            (cluster,) = clusters
            size = 0 if k.name == "broadcast_in_dim" else 2 if k.name == "integer_pow" else 1
            if cluster and cluster.size + size <= self.backend.limit and k.remat is cluster.remat:
                k.cluster = cluster
                cluster.size += size
        if not k.cluster and (k.name in self.backend.reductions or k.is_grown):
            k.cluster = k

    def _fuse(self) -> None:
        """Which kernels there are. From the last to the first."""
        for k in self.kernels:
            grown = lambda r: len(r.readers) == 1 and (
                r.is_grown or (k.name == "broadcast_in_dim" and r.name in self.backend.reductions)
            )
            k.is_grown = k.name in self.backend.absorbed and any(map(grown, k.reads))
        for k in reversed(self.kernels):
            self._join(k)
            fused = [self._fuses(k, reader) for reader in k.readers]
            k.is_materialised = k.is_output or not all(fused) or not k.readers

    def _schedule(self) -> None:
        """The order in which kernels run: breadth first, each when all that it reads is there."""
        entries: dict[int, list[Kernel]] = defaultdict(list)
        outside: dict[int, set[Kernel]] = defaultdict(set)
        for k in self.kernels:
            others = {r for r in k.reads if r.remat is not k.remat} if k.remat else set()
            if k.remat and (others or not k.reads):
                entries[id(k.remat)].append(k)
                outside[id(k.remat)] |= others
        successors: dict[Kernel, list[Kernel]] = {k: list(k.readers) for k in self.kernels}
        missing = {k: len(k.reads) for k in self.kernels}
        for region, ks in entries.items():
            for k in ks:
                for r in outside[region] - set(k.reads):
                    successors[r].append(k)
                    missing[k] += 1
        queue, done = deque(), []

        def release(k):
            ready = [k]
            while ready:
                k = ready.pop()
                if k.is_materialised:
                    queue.append(k)
                else:
                    done.append(k)
                    ready += reached(k)

        def reached(k):
            for r in successors[k]:
                missing[r] -= 1
            return [r for r in dict.fromkeys(successors[k]) if not missing[r]]

        for k in [k for k in self.kernels if not missing[k]]:
            release(k)
        while queue:
            k = queue.popleft()
            done.append(k)
            for r in reached(k):
                release(r)
        assert len(done) == len(self.kernels)
        self.kernels = done
        for at, k in enumerate(done):
            k.at = at

    def _live(self) -> None:
        """How long what each kernel makes is read."""
        for k in reversed(self.kernels):
            again = k.is_cheap and sum(r.count >= k.count and r.name != "broadcast_in_dim" for r in k.reads) <= 1
            for reader in k.readers:
                when = max(reader.at if reader.is_materialised else -1, reader.through)
                if self._fuses(k, reader) and (not k.is_materialised or again):
                    k.through = max(k.through, when)
                else:
                    k.last = max(k.last, when)

    # ------------------------------------------------------------------------------------------------ memory

    def peak(self) -> int:
        ends: dict[int, list[Kernel]] = defaultdict(list)
        for k in self.kernels:
            if k.is_materialised and not k.is_output:
                ends[max(k.last, k.at)].append(k)
        live = most = 0
        for k in self.kernels:
            size = 0 if k.is_output or not k.is_materialised else k.bytes
            dying = ends[k.at]
            is_loop = k.is_cheap or k.name in self.backend.expensive
            reused = is_loop and any(d.bytes == size and d is not k for d in dying)
            most = max(most, live + self._inside(k) + (0 if reused else size))
            live += size - sum(d.bytes for d in dying)
        return most

    def _inside(self, k: Kernel) -> int:
        if k.step is None or not k.step.bodies:
            return 0
        inner = [_Run(body.steps, body.outputs, self.backend).peak() for body in k.step.bodies]
        return k.step.kept_bytes + max(inner)


def _same(step: Step) -> Value | None:
    """The operand that a step returns as it is, if it does: with an axis of size 1, or its maximum with -inf."""
    name, eqn = step.eqn.primitive.name, step.eqn
    if name == "broadcast_in_dim" and step.reads[0].argument != NUMBER and step.reads[0].bytes == step.makes[0].bytes:
        return step.reads[0]
    if name == "max" and any(np.ndim(a.val) == 0 and a.val == -np.inf for a in eqn.invars if hasattr(a, "val")):
        return next(v for v in step.reads if v.argument != NUMBER)
    return None


def _count(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))


def _order(eqn: Any, k: int) -> Sequence[int] | None:
    """The order of axes in which a library call takes its operand; None for any."""
    name, rank = eqn.primitive.name, len(getattr(eqn.invars[k].aval, "shape", ()))
    if name == "dot_general":
        contracted, batch = (sides[k] for sides in eqn.params["dimension_numbers"])
        free = [d for d in range(rank) if d not in contracted and d not in batch]
        if tuple(batch) == tuple(range(len(batch))) and len(contracted) == 1 and len(free) <= 1:
            return None  # transposed or not
        return [*batch, *free, *contracted] if k == 0 else [*batch, *contracted, *free]
    if name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"][k]
        return [spec[0], *spec[2:], spec[1]] if k == 0 else [*spec[2:], spec[1], spec[0]]
    return None


def _moves(order: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether axes are in another order, but for those of size 1."""
    kept = [d for d in order if shape[d] != 1]
    return kept != sorted(kept)
