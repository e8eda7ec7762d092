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

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from .. import _jax
from .steps import NUMBER, Body, Step, Value

_CHEAP = """add sub add_any neg mul square max min sign abs floor ceil round eq ne lt le gt ge and or xor not is_finite select_n
clamp convert_element_type reduce_precision shift_left shift_right_logical shift_right_arithmetic integer_pow real imag complex
copy copy_p broadcast_in_dim broadcast_to iota transpose rev pad slice split dynamic_slice gather concatenate
population_count clz eq_to lt_to le_to conj one_minus_square"""
_EXPENSIVE = """div rem exp exp2 expm1 log log1p log2 sqrt rsqrt cbrt pow sin cos tan asin acos atan atan2 sinh cosh tanh asinh
acosh atanh erf erfc logistic nextafter erf_inv"""
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor"
_MOVING = frozenset("broadcast_in_dim broadcast_to transpose rev pad slice split dynamic_slice gather concatenate".split())  # noqa: SIM905


@dataclass(frozen=True)
class Backend:
    """What one backend fuses.

    Attributes:
      cheap: computed where it is read, however often.
      expensive: computed where it is read, once.
      reductions: library calls that compute their operand themselves, if nobody else reads it.
    """

    cheap: frozenset[str]
    expensive: frozenset[str]
    reductions: frozenset[str]


BACKENDS = {
    "cpu": Backend(*(frozenset(names.split()) for names in (_CHEAP, _EXPENSIVE, _REDUCTIONS))),
    "gpu": Backend(*(frozenset(names.split()) for names in (f"{_CHEAP} {_EXPENSIVE}", "", _REDUCTIONS))),
}


def temp_bytes(steps: Sequence[Step], outputs: Sequence[Value], backend: Backend) -> int:
    """The most bytes that temporaries of a program have at a time."""
    return _Run(steps, outputs, backend).peak({})


@dataclass(eq=False, slots=True)
class Kernel:
    """One value and how it comes about: a kernel, if it is materialised.

    Attributes:
      reads: the kernels whose results it reads, which arguments are not among.
      readers: the kernels that read it.
      last: when its result is read last; `through`: when it is computed last inside others.
    """

    name: str
    value: Value
    at: int
    reads: list[Kernel]
    step: Step | None = None
    readers: list[Kernel] = field(default_factory=list)
    is_output: bool = False
    is_materialised: bool = True
    is_absorbed: bool = False
    last: int = -1
    through: int = -1


class _Run:
    """Steps as kernels."""

    def __init__(self, steps: Sequence[Step], outputs: Sequence[Value], backend: Backend):
        self.backend, self.steps = backend, steps
        self.kernels: list[Kernel] = []
        self.of: dict[Value, Kernel] = {}
        self.known: dict[Any, list[Kernel]] = {}
        for step in steps:
            self._add(step)
        for v in outputs:
            if v in self.of:
                self.of[v].is_output = True
        self._fuse()

    def _add(self, step: Step) -> None:
        """The kernels of a step; none, if the same is computed before it."""
        key = self._key(step)
        if key is not None and key in self.known:
            self.of.update(zip(step.makes, self.known[key], strict=True))
            return
        name = step.eqn.primitive.name
        reads = [self.of[v] for v in dict.fromkeys(step.reads) if v in self.of]
        made = [self._kernel(name, v, reads, step) for v in step.makes]
        if key is not None:
            self.known[key] = made

    def _kernel(self, name: str, v: Value, reads: list[Kernel], step: Step | None) -> Kernel:
        kernel = Kernel(name, v, len(self.kernels), reads, step)
        for k in reads:
            k.readers.append(kernel)
        self.kernels.append(kernel)
        self.of[v] = kernel
        return kernel

    def _key(self, step: Step) -> Any:
        eqn, name = step.eqn, step.eqn.primitive.name
        if name not in self.backend.cheap | self.backend.expensive | self.backend.reductions:
            return None
        again = str(_jax.name_stack(eqn))
        again = again if "rematted" in again else ""
        reads = tuple(
            id(self.of.get(v, v)) if v.argument != NUMBER else str(getattr(w, "val", id(w)))
            for v, w in zip(step.reads, eqn.invars, strict=True)
        )
        return name, reads, again, str(eqn.params), str(eqn.outvars[0].aval)

    # ------------------------------------------------------------------------------------------------ fusion

    def _is_fusible(self, k: Kernel) -> bool:
        return k.name in self.backend.cheap or k.name in self.backend.expensive

    def _is_expensive(self, k: Kernel) -> bool:
        if k.name in ("div", "rem"):  # by a number it is a product
            return k.step.reads[1].argument != NUMBER
        return k.name in self.backend.expensive

    def _fuses(self, k: Kernel, reader: Kernel) -> bool:
        """Whether `reader` computes `k` itself."""
        if not self._is_fusible(k):
            return False
        if reader.name in self.backend.reductions or reader.is_absorbed:
            return len(k.readers) == 1 and k.name not in _MOVING
        if not self._is_fusible(reader):
            return False
        return not self._is_expensive(k) or (len(k.readers) == 1 and reader.name not in _MOVING)

    def _fuse(self) -> None:
        """Which kernels there are, and how long what they make is read. From the last to the first."""
        for k in reversed(self.kernels):
            fused = [self._fuses(k, reader) for reader in k.readers]
            k.is_materialised = k.is_output or not all(fused) or not k.readers
            again = sum(r.value.bytes >= k.value.bytes for r in k.reads) <= 1 and not self._is_expensive(k)
            k.is_absorbed = not k.is_materialised and any(
                r.name in self.backend.reductions or r.is_absorbed for r in k.readers
            )
            for reader, is_fused in zip(k.readers, fused, strict=True):
                when = max(reader.at if reader.is_materialised else -1, reader.through)
                if is_fused and (not k.is_materialised or again):
                    k.through = max(k.through, when)
                else:
                    k.last = max(k.last, when)

    # ------------------------------------------------------------------------------------------------ memory

    def peak(self, outside: dict[Value, bool]) -> int:
        ends: dict[int, list[Kernel]] = defaultdict(list)
        for k in self.kernels:
            if k.is_materialised and not k.is_output:
                ends[max(k.last, k.at)].append(k)
        live = most = 0
        for k in self.kernels:
            size = 0 if k.is_output or not k.is_materialised else k.value.bytes
            inside = self._inside(k)
            dying = ends[k.at]
            reused = self._is_fusible(k) and any(d.value.bytes == size and d is not k for d in dying)
            most = max(most, live + inside + (0 if reused else size))
            live += size - sum(d.value.bytes for d in dying)
        return most

    def _inside(self, k: Kernel) -> int:
        if k.step is None or not k.step.bodies or k.value is not k.step.makes[-1]:
            return 0
        inner = [_Run(body.steps, body.outputs, self.backend).peak({}) for body in k.step.bodies]
        return k.step.kept_bytes + max(inner)
