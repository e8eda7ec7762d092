"""Kernels: the instructions of a compiled program that run, what each is, and the equations that it is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..costs.machines import Machine
from ..costs.operations import Work
from ..costs.table import Row
from .hlo import FREE, Instruction, Module
from .tags import Tag

# What does the work of an equation that became several instructions, and what the names of such equations start with.
CORES = {
    "dot": "dot",
    "convolution": "conv",
    "reduce": "reduce",
    "reduce-window": "reduce_window",
    "scatter": "scatter",
    "gather": "gather",
    "sort": "sort",
    "fft": "fft",
    "custom-call": "",
}
_LIBRARIES = {  # by what the target of a call or fusion contains
    "onednn": "oneDNN",
    "ynn": "YNN",
    "cublas": "cuBLAS",
    "cudnn": "cuDNN",
    "triton": "Triton",
    "lapack": "LAPACK",
    "cusolver": "cuSOLVER",
    "ducc": "DUCC",
}


@dataclass(frozen=True)
class Kernel:
    """Something that runs.

    Attributes:
      name: that of the instruction, as it stands in the HLO.
      kind: "matmul", "convolution", "fusion", or the instruction's opcode.
      library: whose code it runs, as "YNN" or "cuBLAS"; "" for XLA's own.
      equations: those that something of is in it; of what XLA added, as copies, those that it was added for.
      is_added: whether XLA added it.
      times: how often it runs in a call; None in a loop of unknown length.
      work: FLOPs and transcendentals of its equations, and the bytes that it reads and writes, all times together (once, if
        `times` is None).
      elapsed_s: its time in a call, in seconds, all times together; None if it was not measured.
    """

    name: str
    kind: str
    library: str
    equations: tuple[Row, ...]
    times: int | None
    work: Work
    is_added: bool = False
    elapsed_s: float | None = None

    @property
    def scopes(self) -> list[str]:
        """The scopes of its equations, the most frequent first."""
        return [scope for scope, _ in Counter(row.scope for row in self.equations).most_common()]

    @property
    def lines(self) -> list[str]:
        """The user's lines of its equations, the most frequent first."""
        return [line for line, _ in Counter(row.line for row in self.equations).most_common() if line]

    def share(self, of: Machine) -> float | None:
        """How much of the machine it uses: the least time that its work takes there, beside its time."""
        return of.bound(self.work).seconds / self.elapsed_s if self.elapsed_s else None


def kernels_of(module: Module, tags: Sequence[Tag]) -> list[Kernel]:
    """The kernels of a program, with the equations in each."""
    found = [(i, times, owner, _tags_in(module.inside(i))) for i, times, owner in _running(module, module.entry, 1)]
    present = {t for *_, inside in found for t in inside}
    for i, _, _, inside in found:
        inside |= _folded(module.inside(i), tags, present)
    cored = {t for *_, inside in found for t, is_core in inside.items() if is_core}
    neighbours = _Neighbours(module, {i.name: list(inside) for i, _, _, inside in found})
    kernels = []
    for i, times, owner, inside in found:
        done = sum((tags[t].row.once or Work() for t, is_core in inside.items() if is_core or t not in cored), Work())
        whole = Work(done.flops, done.transcendentals, *_traffic(module, i)).times(1 if times is None else times)
        rows = tuple(tags[t].row for t in inside or neighbours.of(i) or owner)
        kernels.append(Kernel(i.name, *_kind(module, i), rows, times, whole, not inside))
    return kernels


def _running(
    module: Module, computation: str, times: int | None, owner: tuple[int, ...] = ()
) -> Iterator[tuple[Instruction, int | None, tuple[int, ...]]]:
    """What runs, how often, and the tag of the loop or branch that it is in."""
    for i in module.computations[computation]:
        if i.opcode in ("while", "conditional", "call", "async-start"):
            n = (None if times is None or i.trips is None else times * i.trips) if i.opcode == "while" else times
            for name in i.called:
                yield from _running(module, name, n, tuple(_tags_in([i])) or owner)
        elif i.opcode not in FREE and not i.opcode.endswith("-done"):
            yield i, times, owner


def _tags_in(instructions: Sequence[Instruction]) -> dict[int, bool]:
    """The equations that these instructions are of, and whether what an equation is named for is among them."""
    tags: dict[int, bool] = {}
    for i in instructions:
        if i.tag is not None and i.opcode not in ("parameter", "tuple", "get-tuple-element"):
            tags[i.tag] = tags.get(i.tag, False) or i.opcode in CORES
    return tags


def _folded(instructions: Sequence[Instruction], tags: Sequence[Tag], present: set[int]) -> dict[int, bool]:
    """Equations that became one with what reads them, as a product with its transpose: only the reader's name is left."""
    found = {}
    for i in instructions:
        made = CORES.get(i.opcode)
        if i.tag is None or made is None or str(tags[i.tag].row.eqn.primitive).startswith(made):
            continue
        front = [i.tag]
        for _ in range(4):  # a reader is a transpose or two away
            front = [p for t in front for p in tags[t].parents if p not in present]
            for t in front:
                if str(tags[t].row.eqn.primitive).startswith(made):
                    found[t] = True
    return found


class _Neighbours(NamedTuple):
    """Which equations something belongs to that XLA added: those of what reads it, else of what it reads."""

    module: Module
    known: dict[str, list[int]]

    def of(self, instruction: Instruction) -> list[int]:
        readers, made = self.module.readers, self.module.by_name
        return self._first(instruction, lambda i: readers[i.name]) or self._first(
            instruction, lambda i: [made[name] for name in i.operands]
        )

    def _first(self, instruction: Instruction, near: Callable[[Instruction], Sequence[Instruction]]) -> list[int]:
        seen, front = {instruction.name}, [instruction]
        while front:
            front = [i for j in front for i in near(j) if i.name not in seen]
            seen.update(i.name for i in front)
            for i in front:
                if tags := self.known.get(i.name) or list(_tags_in([i])):
                    return tags
        return []


def _kind(module: Module, instruction: Instruction) -> tuple[str, str]:
    """What a kernel is, and whose code it runs."""
    inside = module.inside(instruction)
    targets = " ".join(i.target for i in inside).lower()
    library = next((name for part, name in _LIBRARIES.items() if part in targets), "")
    opcodes = {i.opcode for i in inside}
    if "convolution" in opcodes or "conv" in targets:
        return "convolution", library
    if "dot" in opcodes or "gemm" in targets or "matmul" in targets:
        return "matmul", library
    return ("library" if instruction.opcode == "custom-call" and library else instruction.opcode), library


def _traffic(module: Module, instruction: Instruction) -> tuple[float, float]:
    """The bytes that a kernel reads and writes. A slice is what is read of an array, an update what is written over one."""
    made = module.by_name
    if instruction.opcode != "fusion":
        return sum(made[name].nbytes for name in instruction.operands), instruction.nbytes
    inside = module.computations[instruction.called[0]]
    read = 0.0
    for parameter in (i for i in inside if i.opcode == "parameter"):
        users = module.readers[parameter.name]
        is_first = all(i.operands[0] == parameter.name for i in users)
        if is_first and all(i.opcode in ("dynamic-slice", "gather") for i in users):
            read += sum(i.nbytes for i in users)
        elif not (is_first and all(i.opcode == "dynamic-update-slice" for i in users)):
            read += parameter.nbytes
    root = inside[-1]
    results = [made[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return read, sum(made[i.operands[1]].nbytes if i.opcode == "dynamic-update-slice" else i.nbytes for i in results)
