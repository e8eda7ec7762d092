"""What XLA keeps in memory: `temp_bytes`, its temporaries as predicted from the jaxpr, before anything is compiled.

XLA fuses operations into kernels, and only what one kernel hands to another has memory. The model goes the same way:

1. Kernels. The same operation on the same operands is there once, but for what a backward pass computes again behind a barrier.
   Numbers and smaller arrays are broadcast to what they meet. A product or convolution whose operand has its axes in
   an order that the library does not take reads a copy.
2. Fusion. What is computed element by element is computed where it is read, as often as it is read. It is *materialised* where a
   library call (product, convolution, sort …) reads it, and where it is expensive (exp, tanh …) and has several
   readers. On CPUs a reduction draws in what only it reads, up to a number of operations; what it shares with others,
   broadcast numbers too, is materialised. So is what is computed from several arrays of its size, if it has several readers
   and one of them also needs it by way of something in memory: the sums in a residual network. On GPUs a reduction computes
   what it reads; there, what several kernels read is materialised if it is computed from several arrays of its size, or
   else a mask of it.
3. Schedule. Breadth first: a kernel runs in the order in which its operands come to be there.
4. Buffers. A value is alive until the last kernel that reads it, or that reads what is fused from it. A kernel writes over an
   operand of its size that dies with it. Results are the caller's memory, in which earlier temporaries find room. A
   loop holds its carry and its stacks outside of its body and updates them in place.

Sources: XLA's instruction_fusion.cc (what is expensive, and what may be duplicated), buffer_assignment.cc, and the buffers
that `--xla_dump_to` lists for the programs of tests/trainings.py.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backends import MOVES, REDUCTIONS, Backend
from .inlining import NUMBER, InlinedEqn, Value
from .library_calls import is_moved, order_of, workspace_bytes

_IN_PLACE = {
    "sort",
    "dynamic_update_slice",
    *(f"scatter{what}" for what in ("", "-add", "-sub", "-mul", "-min", "-max")),
}
_BROADCAST, _COPY = "broadcast_in_dim", "transpose"


def temp_bytes(steps: Sequence[InlinedEqn], outputs: Sequence[Value], backend: Backend) -> int:
    """The most bytes that the temporaries of a program hold at a time."""
    return _Program(steps, outputs, backend).temp_bytes(is_inner=False)


def materialised(steps: Sequence[InlinedEqn], outputs: Sequence[Value], backend: Backend) -> set[int]:
    """The ids of the equations whose results have memory of their own."""
    return {id(k.step.eqn) for k in _Program(steps, outputs, backend).kernels if k.step and k.is_materialised}


@dataclass(eq=False, slots=True)
class Kernel:
    """What makes one value: a kernel of its own if the value is materialised, or else a part of its readers.

    Attributes:
      bytes, count: of its value, and how many elements that has.
      reads: the kernels that make its operands; arguments are not among them.
      remat: of a value that is computed again, the equation that does it.
      is_kept: of a mask that has memory, so that what it is a mask of needs none.
      cluster: the reduction that draws it in.
      at: its place in the order in which kernels run.
      last: when its value is read last; `inlined`: when it is computed last as a part of others.
    """

    name: str
    bytes: int
    count: int
    reads: list[Kernel]
    step: InlinedEqn | None = None
    remat: Any = None
    is_cheap: bool = False
    is_elementwise: bool = False
    readers: list[Kernel] = field(default_factory=list)
    is_output: bool = False
    is_materialised: bool = True
    is_kept: bool = False
    follows_reduction: bool = False
    cluster: Kernel | None = None
    drawn: int = 0
    at: int = 0
    last: int = -1
    inlined: int = -1

    @property
    def temp_bytes(self) -> int:
        """The bytes of its value, if that is a temporary."""
        return 0 if self.is_output or not self.is_materialised else self.bytes

    @property
    def is_in_place(self) -> bool:
        """Whether it may write over an operand."""
        return (self.is_elementwise and self.name not in MOVES) or self.name in _IN_PLACE


class _Program:
    """Steps as kernels."""

    def __init__(self, steps: Sequence[InlinedEqn], outputs: Sequence[Value], backend: Backend):
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

    # ------------------------------------------------------------------------------------------------ kernels

    def _add(self, step: InlinedEqn) -> None:
        """The kernels of a step; none, if the same is computed before it."""
        name, eqn, backend = step.eqn.primitive.name, step.eqn, self.backend
        same = _returned(step)
        if same is not None:
            if same in self.of:
                self.of[step.makes[0]] = self.of[same]
            return
        is_elementwise = name in backend.cheap or name in backend.expensive
        operands = [self._operand(step, k, is_elementwise) for k in range(len(step.reads))]
        reads = list(dict.fromkeys(r for r in operands if isinstance(r, Kernel)))
        remat = step.remat if backend.has_barriers else None
        key: Any = id(step)
        if is_elementwise or name in REDUCTIONS:
            key = name, *map(_identity, operands), id(remat), str(eqn.params), eqn.outvars[0].aval.dtype
        if key not in self.known:
            # By a number, a division is a product.
            is_cheap = name in backend.cheap or (name in ("div", "rem") and step.reads[1].argument == NUMBER)
            made = [(v.bytes, _count(v.aval)) for v in step.makes] or [(0, 0)]
            self.known[key] = [
                self._kernel(Kernel(name, *size, reads, step, remat, is_cheap, is_elementwise)) for size in made
            ]
        self.of.update(zip(step.makes, self.known[key], strict=False))

    def _kernel(self, kernel: Kernel) -> Kernel:
        for k in kernel.reads:
            k.readers.append(kernel)
        self.kernels.append(kernel)
        return kernel

    def _operand(self, step: InlinedEqn, k: int, is_elementwise: bool) -> Any:
        """The kernel that makes an operand as the step takes it, or what identifies the argument or number that it is."""
        v, atom = step.reads[k], step.eqn.invars[k]
        source: Any = self.of.get(v, v)
        if v.argument == NUMBER and hasattr(atom, "val"):
            source = np.asarray(atom.val, atom.aval.dtype).tobytes()
        order = order_of(step.eqn, k, self.backend)
        shape = getattr(atom.aval, "shape", ())
        if order is not None and is_moved(order, shape):
            return self._moved(_COPY, source, atom.aval.dtype, step, shape, tuple(order))
        if is_elementwise and step.eqn.primitive.name not in MOVES:
            made = step.eqn.outvars[0].aval.shape
            if shape != made:
                return self._moved(_BROADCAST, source, atom.aval.dtype, step, made)
        return source

    def _moved(
        self, name: str, source: Any, dtype: Any, step: InlinedEqn, shape: tuple[int, ...], order: Any = None
    ) -> Kernel:
        """A copy in another order of axes, or a broadcast to `shape`; one for all that read it."""
        remat = step.remat if self.backend.has_barriers else None
        key = name, _identity(source), dtype, shape, order, id(remat)
        if key not in self.known:
            reads, count = [source] if isinstance(source, Kernel) else [], math.prod(shape)
            moved = Kernel(name, count * dtype.itemsize, count, reads, None, remat, True, True)
            self.known[key] = [self._kernel(moved)]
        return self.known[key][0]

    # ------------------------------------------------------------------------------------------------ fusion

    def _fuse(self) -> None:
        """Which kernels are drawn in by reductions, and which are materialised."""
        backend = self.backend
        if backend.sharing:
            self._find_spread()
        for k in self.kernels:
            follows = lambda r: (
                len(r.readers) == 1 and (r.follows_reduction or (k.name == _BROADCAST and r.name in backend.reductions))
            )
            k.follows_reduction = (k.name in backend.drawn or k.name == _BROADCAST) and any(map(follows, k.reads))
        upto: dict[Kernel, int] = {}  # a kernel and those that need it, as bits
        beyond: dict[Kernel, int] = {}  # those that need it by way of something in memory
        for n, k in enumerate(reversed(self.kernels)):
            self._draw(k)
            k.is_materialised = (
                k.is_output or not k.readers or not all(self._is_fused(k, reader) for reader in k.readers)
            )
            if backend.sharing:
                continue
            after = across = 0
            for r in k.readers:
                after |= upto[r]
                across |= beyond[r] if self._is_fused(k, r) else upto[r]
            if _is_of_several(k) and any(across >> upto[r].bit_length() - 1 & 1 for r in k.readers):
                k.is_cheap, k.is_materialised = False, True
            upto[k], beyond[k] = after | 1 << n, after if k.is_materialised else across

    def _find_spread(self) -> None:
        """What several kernels read is not cheap if it is computed from several arrays of its size.

        Of such a value and of a mask of it, the mask has memory, if that is all.
        """
        anchors: dict[Kernel, set[Kernel]] = {}
        for k in self.kernels:
            found = set().union(*(anchors[r] for r in k.reads if r.count >= k.count))
            if k.is_cheap and len(k.readers) > 1 and len(found) > 1:
                masks = [r for r in k.readers if r.is_elementwise and r.bytes < k.bytes]
                if len(masks) == len(k.readers) - 1:
                    for mask in masks:
                        mask.is_kept = True
                else:
                    k.is_cheap = False
            is_read_again = k.is_elementwise and not k.is_kept and (k.is_cheap or len(k.readers) < 2)
            anchors[k] = found if is_read_again else {k}

    def _draw(self, k: Kernel) -> None:
        """Find the cluster of `k`: that of all its readers, if it is one and has room."""
        clusters = {r.cluster for r in k.readers}
        cluster = clusters.pop() if len(clusters) == 1 else None
        if cluster and not k.is_output and k.remat is cluster.remat:
            operations = {_BROADCAST: 0, "integer_pow": 2}.get(k.name, 1)  # of XLA's
            if k.name == _BROADCAST or (
                k.name in self.backend.drawn and cluster.drawn + operations < self.backend.limit
            ):
                k.cluster = cluster
                cluster.drawn += operations
                return
        if k.name in self.backend.reductions or k.follows_reduction:
            k.cluster = k

    def _is_fused(self, k: Kernel, reader: Kernel) -> bool:
        """Whether `reader` computes `k` itself."""
        if k.is_kept:
            return False
        if reader.remat is not None and k.remat is not reader.remat:
            return False  # a barrier lies between them
        if reader.cluster:
            return k.cluster is reader.cluster
        if not (k.is_elementwise and (reader.is_elementwise or reader.name in self.backend.sharing)):
            return False
        return k.is_cheap or (len(k.readers) == 1 and reader.name not in MOVES)

    # ------------------------------------------------------------------------------------------------ schedule

    def _schedule(self) -> None:
        """Sort the kernels as they run: breadth first."""
        missing = {k: len(k.reads) for k in self.kernels}
        barriers = defaultdict[Kernel, list[Kernel]](list)  # that a kernel comes before
        for barrier, entered in self._barriers():
            barrier.readers, missing[barrier] = entered, len(barrier.reads)
            for k in barrier.reads:
                barriers[k].append(barrier)
            for k in entered:
                missing[k] += 1
        order: list[Kernel] = []
        running = deque[Kernel]()
        ready = [k for k in reversed(self.kernels) if not missing[k]]
        while ready or running:
            if ready and ready[-1].is_materialised:
                running.append(ready.pop())
                continue
            k = ready.pop() if ready else running.popleft()
            order.append(k)
            for reader in reversed([*k.readers, *barriers.get(k, ())]):
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
        self.kernels = [k for k in order if k.name != "barrier"]
        for at, k in enumerate(self.kernels):
            k.at = at

    def _barriers(self) -> Iterator[tuple[Kernel, list[Kernel]]]:
        """Of each backward pass that computes again: a stand-in for its barrier, and the kernels behind it."""
        outside = defaultdict[Any, dict[Kernel, None]](dict)
        entered = defaultdict[Any, list[Kernel]](list)
        for k in self.kernels:
            if k.remat is not None:
                others = [r for r in k.reads if r.remat is not k.remat]
                outside[id(k.remat)].update(dict.fromkeys(others))
                if others or not k.reads:
                    entered[id(k.remat)].append(k)
        for key, reads in outside.items():
            if reads:
                yield Kernel("barrier", 0, 0, list(reads), is_materialised=False), entered[key]

    # ------------------------------------------------------------------------------------------------ buffers

    def _live(self) -> None:
        """How long each value is read, from the last kernel to the first."""
        for k in reversed(self.kernels):
            k.last = k.at
            # What has one operand of its size is computed again rather than read, even if it is there.
            again = (
                not self.backend.sharing
                and k.is_cheap
                and sum(r.count >= k.count and r.name != _BROADCAST for r in k.reads) <= 1
            )
            for reader in k.readers:
                when = max(reader.at if reader.is_materialised else -1, reader.inlined)
                if self._is_fused(k, reader) and (again or not k.is_materialised):
                    k.inlined = max(k.inlined, when)
                else:
                    k.last = max(k.last, when)

    def temp_bytes(self, is_inner: bool = True) -> int:
        """The peak of live bytes."""
        hosted = set() if is_inner else self._hosted()
        dying = defaultdict[int, list[Kernel]](list)
        for k in self.kernels:
            if k.temp_bytes and k not in hosted:
                dying[k.last].append(k)
        live = most = 0
        inside: dict[int, int] = {}
        for k in self.kernels:
            new = 0 if k in hosted else k.temp_bytes
            if k.step and k.step.bodies and id(k.step) not in inside:
                bodies = [_Program(b.steps, b.outputs, self.backend).temp_bytes() * b.copies for b in k.step.bodies]
                inside[id(k.step)] = k.step.kept_bytes + max(bodies)
            inner = inside.get(id(k.step), workspace_bytes(k.step.eqn, self.backend) if k.step else 0)
            is_over = k.is_in_place and any(d.bytes == new and d is not k for d in dying[k.at])
            most = max(most, live + inner + (0 if is_over else new))
            live += new - sum(d.bytes for d in dying[k.at])
        return most

    def _hosted(self) -> set[Kernel]:
        """The temporaries that find room in the memory of a result before that is written, the largest first."""
        results = sorted((k for k in self.kernels if k.is_output and k.bytes), key=lambda k: k.bytes)
        sizes, written = [r.bytes for r in results], [r.at for r in results]
        guests: list[list[Kernel]] = [[] for _ in results]
        starts: list[list[int]] = [[] for _ in results]
        found = set()
        for k in sorted(self.kernels, key=lambda k: -k.temp_bytes):
            if not k.temp_bytes:
                break
            for i in range(bisect.bisect_left(sizes, k.bytes), len(results)):
                if written[i] <= k.last and not _makes_room(k, results[i]):
                    continue
                j = bisect.bisect(starts[i], k.at)
                before, after = guests[i][max(j - 1, 0) : j], guests[i][j : j + 1]
                if (not after or _makes_room(k, after[0])) and (not before or _makes_room(before[0], k)):
                    starts[i].insert(j, k.at)
                    guests[i].insert(j, k)
                    found.add(k)
                    break
        return found


def _is_of_several(k: Kernel) -> bool:
    """Whether several read it, and it reads several arrays of its size: read again in each, these would be read more often."""
    if not k.is_cheap or len(k.readers) < 2 or k.step is None:
        return False
    arguments = {v for v in k.step.reads if v.argument not in (None, NUMBER) and _count(v.aval) >= k.count}
    made = [r for r in k.reads if r.count >= k.count and r.name != _BROADCAST]
    return len(made) + len(arguments) > 1


def _makes_room(k: Kernel, later: Kernel) -> bool:
    """Whether `later` may have the memory of `k`."""
    return k.last < later.at or (k.last == later.at and later.is_in_place and k.bytes == later.bytes)


def _identity(operand: Any) -> Any:
    return operand if isinstance(operand, bytes) else id(operand)


def _count(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))


def _returned(step: InlinedEqn) -> Value | None:
    """The operand that a step returns as it is, if it does: with an axis of size 1, or its maximum with -inf."""
    name, eqn = step.eqn.primitive.name, step.eqn
    if name == _BROADCAST and step.reads[0].argument != NUMBER and step.reads[0].bytes == step.makes[0].bytes:
        return step.reads[0]
    if name == "max" and any(np.ndim(a.val) == 0 and a.val == -np.inf for a in eqn.invars if hasattr(a, "val")):
        return next((v for v in step.reads if v.argument != NUMBER), None)
    return None
