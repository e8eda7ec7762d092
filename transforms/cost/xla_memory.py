"""`temp_bytes`: the temporaries of XLA, predicted from the jaxpr before anything is compiled.

XLA fuses operations into kernels, and only values that one kernel hands to another have memory. The model has the same steps:

1. Kernels. Equal operations on equal operands are merged (common-subexpression elimination), except across the barrier of a
   backward pass that recomputes. Operands are broadcast to the shape of the result. A library call (product, convolution) that
   does not take the order of axes of an operand reads a copy.
2. Fusion. An elementwise operation is computed in each of its readers. It is *materialised* where a library call reads it, and
   where it is expensive (exp, tanh …) and has several readers. On CPUs a reduction draws in operations that only it reads, up
   to a limit; values that it shares with other readers are materialised, broadcast numbers too. So is a value that is computed
   from several arrays of its size, if it has several readers and one of them also depends on it by way of memory: the sums of
   a residual network. On GPUs a reduction computes its operands itself; there, a value with several readers is materialised if
   it is computed from several arrays of its size, or else a mask of it.
3. Schedule. Breadth first: kernels run in the order in which their last operand is computed.
4. Buffers. A value is alive until the last kernel that reads it, or reads what is fused from it. A kernel overwrites an operand
   of its size that dies with it. Results are memory of the caller, which earlier temporaries use. A loop holds its carry and
   its stacks outside of its body and updates them in place.

Sources: XLA's instruction_fusion.cc (which operations are expensive, and which may be duplicated) and buffer_assignment.cc; the
buffers that `--xla_dump_to` lists for the programs of tests/trainings.py, which also test the model.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backends import MOVES, REDUCTIONS, Backend, names
from .inlining import NUMBER, InlinedEqn, Value
from .library_calls import copy_order, workspace_bytes

_IN_PLACE = names("sort dynamic_update_slice scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max")
_BROADCAST, _COPY = "broadcast_in_dim", "transpose"


def temp_bytes(steps: Sequence[InlinedEqn], outputs: Sequence[Value], backend: Backend) -> int:
    """The peak of the bytes of temporaries of a program."""
    return _Module(steps, outputs, backend).temp_bytes(is_inner=False)


def materialised_eqns(steps: Sequence[InlinedEqn], outputs: Sequence[Value], backend: Backend) -> set[int]:
    """The ids of the equations whose results are materialised."""
    return {id(k.step.eqn) for k in _Module(steps, outputs, backend).kernels if k.step and k.is_materialised}


@dataclass(eq=False, slots=True)
class Kernel:
    """The operation that computes one value: a kernel of its own if the value is materialised, else a part of its readers.

    Attributes:
      bytes, count: of its value; `count` is the number of elements.
      reads: the kernels of its operands, without arguments.
      remat: the equation that recomputes it; None for others.
      is_kept: for a mask that is materialised in place of the masked value.
      follows_reduction: whether it only transforms the result of a reduction, and may head a cluster of its own.
      cluster: the reduction that draws it in; `drawn` counts the operations of a cluster.
      at: its place in the schedule.
      last: the place where its value is read last; `last_inlined`: where it is computed last as a part of a reader.
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
    last_inlined: int = -1

    @property
    def temp_bytes(self) -> int:
        """The bytes of its value, if it is a temporary."""
        return 0 if self.is_output or not self.is_materialised else self.bytes

    @property
    def is_in_place(self) -> bool:
        """Whether it may overwrite an operand."""
        return (self.is_elementwise and self.name not in MOVES) or self.name in _IN_PLACE


class _Module:
    """A program as kernels."""

    def __init__(self, steps: Sequence[InlinedEqn], outputs: Sequence[Value], backend: Backend):
        self.backend = backend
        self.kernels: list[Kernel] = []
        self.of: dict[Value, Kernel] = {}
        self.memo: dict[Any, list[Kernel]] = {}  # for common-subexpression elimination
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
        """Add the kernels of a step, if no equal step has them already."""
        name, eqn, backend = step.eqn.primitive.name, step.eqn, self.backend
        alias = _alias(step)
        if alias is not None:
            if alias in self.of:
                self.of[step.makes[0]] = self.of[alias]
            return
        is_elementwise = name in backend.cheap or name in backend.expensive
        operands = [self._operand(step, k, is_elementwise) for k in range(len(step.reads))]
        reads = list(dict.fromkeys(r for r in operands if isinstance(r, Kernel)))
        remat = step.remat if backend.has_barriers else None
        key: Any = id(step)
        if is_elementwise or name in REDUCTIONS:
            key = name, *map(_identity, operands), id(remat), str(eqn.params), eqn.outvars[0].aval.dtype
        if key not in self.memo:
            # XLA turns a division by a number into a product.
            is_cheap = name in backend.cheap or (name in ("div", "rem") and step.reads[1].argument == NUMBER)
            sizes = [(v.bytes, _count(v.aval)) for v in step.makes] or [(0, 0)]
            self.memo[key] = [
                self._kernel(Kernel(name, *size, reads, step, remat, is_cheap, is_elementwise)) for size in sizes
            ]
        self.of.update(zip(step.makes, self.memo[key], strict=False))

    def _kernel(self, kernel: Kernel) -> Kernel:
        for k in kernel.reads:
            k.readers.append(kernel)
        self.kernels.append(kernel)
        return kernel

    def _operand(self, step: InlinedEqn, k: int, is_elementwise: bool) -> Any:
        """The kernel of the k-th operand as the step reads it; for an argument or a number, what identifies it."""
        v, atom = step.reads[k], step.eqn.invars[k]
        source: Any = self.of.get(v, v)
        if v.argument == NUMBER and hasattr(atom, "val"):
            source = np.asarray(atom.val, atom.aval.dtype).tobytes()
        shape = getattr(atom.aval, "shape", ())
        if order := copy_order(step.eqn, k, self.backend):
            return self._copied(_COPY, source, atom.aval.dtype, step, shape, order)
        if is_elementwise and step.eqn.primitive.name not in MOVES:
            out_shape = step.eqn.outvars[0].aval.shape
            if shape != out_shape:
                return self._copied(_BROADCAST, source, atom.aval.dtype, step, out_shape)
        return source

    def _copied(
        self, name: str, source: Any, dtype: Any, step: InlinedEqn, shape: tuple[int, ...], order: Any = None
    ) -> Kernel:
        """A copy in another order of axes, or a broadcast to `shape`; one for all readers."""
        remat = step.remat if self.backend.has_barriers else None
        key = name, _identity(source), dtype, shape, order, id(remat)
        if key not in self.memo:
            reads, count = [source] if isinstance(source, Kernel) else [], math.prod(shape)
            copy = Kernel(name, count * dtype.itemsize, count, reads, None, remat, True, True)
            self.memo[key] = [self._kernel(copy)]
        return self.memo[key][0]

    # ------------------------------------------------------------------------------------------------ fusion

    def _fuse(self) -> None:
        """Decide which kernels reductions draw in, and which are materialised.

        Invariant: the readers of a kernel are decided before it.
        """
        backend = self.backend
        if backend.sharing:
            self._materialise_shared()
        for k in self.kernels:
            follows = lambda r: (
                len(r.readers) == 1 and (r.follows_reduction or (k.name == _BROADCAST and r.name in backend.reductions))
            )
            k.follows_reduction = (k.name in backend.drawn or k.name == _BROADCAST) and any(map(follows, k.reads))
        descendants: dict[Kernel, int] = {}  # a kernel and all that depend on it, as bits
        beyond: dict[Kernel, int] = {}  # those that depend on it by way of something in memory
        for n, k in enumerate(reversed(self.kernels)):
            self._draw(k)
            k.is_materialised = (
                k.is_output or not k.readers or not all(self._is_fused(k, reader) for reader in k.readers)
            )
            if backend.sharing:
                continue
            after = across = 0
            for r in k.readers:
                after |= descendants[r]
                across |= beyond[r] if self._is_fused(k, r) else descendants[r]
            if _is_of_several(k) and any(across >> descendants[r].bit_length() - 1 & 1 for r in k.readers):
                k.is_cheap, k.is_materialised = False, True
            descendants[k], beyond[k] = after | 1 << n, after if k.is_materialised else across

    def _materialise_shared(self) -> None:
        """Values with several readers are not cheap if they are computed from several arrays of their size.

        If all readers but one are masks of the value, the masks are materialised instead.
        """
        anchors: dict[Kernel, set[Kernel]] = {}
        for k in self.kernels:
            sources = set().union(*(anchors[r] for r in k.reads if r.count >= k.count))
            if k.is_cheap and len(k.readers) > 1 and len(sources) > 1:
                masks = [r for r in k.readers if r.is_elementwise and r.bytes < k.bytes]
                if len(masks) == len(k.readers) - 1:
                    for mask in masks:
                        mask.is_kept = True
                else:
                    k.is_cheap = False
            is_inlined = k.is_elementwise and not k.is_kept and (k.is_cheap or len(k.readers) < 2)
            anchors[k] = sources if is_inlined else {k}

    def _draw(self, k: Kernel) -> None:
        """Put `k` into the cluster of its readers, if they share one that has room; or let it head a cluster."""
        clusters = {r.cluster for r in k.readers}
        cluster = clusters.pop() if len(clusters) == 1 else None
        if cluster and not k.is_output and k.remat is cluster.remat:
            operations = {_BROADCAST: 0, "integer_pow": 2}.get(k.name, 1)  # in HLO
            if k.name == _BROADCAST or (
                k.name in self.backend.drawn and cluster.drawn + operations < self.backend.limit
            ):
                k.cluster = cluster
                cluster.drawn += operations
                return
        if k.name in self.backend.reductions or k.follows_reduction:
            k.cluster = k

    def _is_fused(self, k: Kernel, reader: Kernel) -> bool:
        """Whether `reader` computes `k` as a part of itself."""
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
        """Sort the kernels breadth first. Invariant: all operands of a kernel in `ready` are in `order`."""
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
        """For each backward pass that recomputes: a kernel for its barrier, and the kernels behind the barrier."""
        outside = defaultdict[Any, dict[Kernel, None]](dict)
        entered = defaultdict[Any, list[Kernel]](list)
        for k in self.kernels:
            if k.remat is not None:
                entering = [r for r in k.reads if r.remat is not k.remat]
                outside[id(k.remat)].update(dict.fromkeys(entering))
                if entering or not k.reads:
                    entered[id(k.remat)].append(k)
        for key, reads in outside.items():
            if reads:
                yield Kernel("barrier", 0, 0, list(reads), is_materialised=False), entered[key]

    # ------------------------------------------------------------------------------------------------ buffers

    def _live(self) -> None:
        """Find the last read of each value. Invariant: those of the readers of a kernel are found before it."""
        for k in reversed(self.kernels):
            k.last = k.at
            # A cheap value with one operand of its size is inlined in its readers, even if it is materialised.
            is_inlined = (
                not self.backend.sharing
                and k.is_cheap
                and sum(r.count >= k.count and r.name != _BROADCAST for r in k.reads) <= 1
            )
            for reader in k.readers:
                last_run = max(reader.at if reader.is_materialised else -1, reader.last_inlined)
                if self._is_fused(k, reader) and (is_inlined or not k.is_materialised):
                    k.last_inlined = max(k.last_inlined, last_run)
                else:
                    k.last = max(k.last, last_run)

    def temp_bytes(self, is_inner: bool = True) -> int:
        """The peak of live bytes. Invariant: `live` has the temporaries that a kernel before wrote and one from here on reads."""
        hosted = set() if is_inner else self._hosted()
        dying = defaultdict[int, list[Kernel]](list)
        for k in self.kernels:
            if k.temp_bytes and k not in hosted:
                dying[k.last].append(k)
        live = most = 0
        body_bytes: dict[int, int] = {}
        for k in self.kernels:
            new = 0 if k in hosted else k.temp_bytes
            if k.step and k.step.bodies and id(k.step) not in body_bytes:
                peaks = [_Module(b.steps, b.outputs, self.backend).temp_bytes() * b.copies for b in k.step.bodies]
                body_bytes[id(k.step)] = k.step.kept_bytes + max(peaks)
            inside = body_bytes.get(id(k.step), workspace_bytes(k.step.eqn, self.backend) if k.step else 0)
            is_overwriting = k.is_in_place and any(d.bytes == new and d is not k for d in dying[k.at])
            most = max(most, live + inside + (0 if is_overwriting else new))
            live += new - sum(d.bytes for d in dying[k.at])
        return most

    def _hosted(self) -> set[Kernel]:
        """The temporaries that use the memory of a result before it is written; first fit, the largest first.

        Invariant: the guests of a result are disjoint in time, and sorted by their starts.
        """
        results = sorted((k for k in self.kernels if k.is_output and k.bytes), key=lambda k: k.bytes)
        sizes, written = [r.bytes for r in results], [r.at for r in results]
        guests: list[list[Kernel]] = [[] for _ in results]
        starts: list[list[int]] = [[] for _ in results]
        hosted = set()
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
                    hosted.add(k)
                    break
        return hosted


def _is_of_several(k: Kernel) -> bool:
    """Whether it has several readers and several operands of its size, which inlining would read more often."""
    if not k.is_cheap or len(k.readers) < 2 or k.step is None:
        return False
    arguments = {v for v in k.step.reads if v.argument not in (None, NUMBER) and _count(v.aval) >= k.count}
    operands = [r for r in k.reads if r.count >= k.count and r.name != _BROADCAST]
    return len(operands) + len(arguments) > 1


def _makes_room(k: Kernel, later: Kernel) -> bool:
    """Whether `later` may use the memory of `k`."""
    return k.last < later.at or (k.last == later.at and later.is_in_place and k.bytes == later.bytes)


def _identity(operand: Any) -> Any:
    return operand if isinstance(operand, bytes) else id(operand)


def _count(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))


def _alias(step: InlinedEqn) -> Value | None:
    """The operand that a step returns unchanged: broadcast by axes of size 1, or its maximum with -inf. None for others."""
    name, eqn = step.eqn.primitive.name, step.eqn
    if name == _BROADCAST and step.reads[0].argument != NUMBER and step.reads[0].bytes == step.makes[0].bytes:
        return step.reads[0]
    if name == "max" and any(np.ndim(a.val) == 0 and a.val == -np.inf for a in eqn.invars if hasattr(a, "val")):
        return next((v for v in step.reads if v.argument != NUMBER), None)
    return None
