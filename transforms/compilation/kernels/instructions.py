"""Kernels: the instructions of a compiled program that run, what each is, and the equations that it is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...core import subjaxprs
from ...cost.device import Machine
from ...cost.operations import Work
from ...cost.table import Row
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
CORE = 1000  # how much one of these counts
_NAMED = ("dot", "convolution")  # of which every one is an equation's
_MOVES = frozenset(("copy", "bitcast", "transpose", "reshape", "broadcast", "slice", "concatenate", "pad"))
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
    def sort(self) -> str:
        """Its kind, with the library."""
        return f"{self.kind} ({self.library})" if self.library else self.kind

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
    """The kernels of a program, with the equations in each.

    The work of an equation is that of the kernels that do what it is named for, or else of the one with the most of it.
    """
    runs = list(_running(module, tags, module.entry))
    inside = [_parts(module.inside(run.instruction), tags) for run in runs]
    known = {run.instruction.name: list(parts) for run, parts in zip(runs, inside, strict=True)}
    neighbours = _Neighbours(module, known)
    done = {t for parts in inside for t, score in parts.items() if score >= CORE}
    for run, parts in zip(runs, inside, strict=True):
        for core in module.inside(run.instruction):
            is_unnamed = core.opcode in _NAMED and not _is_named(core, core.tag, tags)
            tag = _named(core, run.instruction, tags, neighbours, done) if is_unnamed else None
            if tag is not None:
                parts[tag] = parts.get(tag, 0) + CORE
                done.add(tag)
    best = {t: max(parts.get(t, 0) for parts in inside) for t in {t for parts in inside for t in parts}}
    doers = {t: [k for k, parts in enumerate(inside) if parts.get(t, -1) == most] for t, most in best.items()}
    kernels = []
    for k, (run, parts) in enumerate(zip(runs, inside, strict=True)):
        shares = {t: doers[t] if best[t] >= CORE else doers[t][:1] for t in parts}
        works = [(tags[t].row.once, run.trips / len(share)) for t, share in shares.items() if k in share]
        work = Work.sum(once.times(n) for once, n in works if once)
        read, written = (bytes_ * (run.times or 1) for bytes_ in _traffic(module, run.instruction))
        whole = Work(work.flops, work.transcendentals, read, written)
        rows = tuple(tags[t].row for t in parts or neighbours.of(run.instruction) or run.owner)
        name, kind = run.instruction.name, _kind(module, run.instruction)
        kernels.append(Kernel(name, *kind, rows, run.times, whole, not parts))
    return kernels


class _Run(NamedTuple):
    """An instruction that runs: how often, how often the loops among the equations around it go round, and the innermost."""

    instruction: Instruction
    times: int | None
    trips: int
    owner: tuple[int, ...]


def _running(
    module: Module,
    tags: Sequence[Tag],
    computation: str,
    times: int | None = 1,
    trips: int = 1,
    owner: tuple[int, ...] = (),
) -> Iterator[_Run]:
    for i in module.computations[computation]:
        if i.opcode in ("while", "conditional", "call", "async-start"):
            inner, around, rounds = owner if i.tag is None else (i.tag,), times, trips
            if i.opcode == "while":
                around = None if times is None or i.trips is None else times * i.trips
                is_loop = i.tag is not None and bool(
                    subjaxprs.bodies(tags[i.tag].row.eqn)
                )  # not one that an operation became
                rounds = trips * (i.trips or 1) if is_loop else trips
            for name in i.called:
                yield from _running(module, tags, name, around, rounds, inner)
        elif i.opcode not in FREE and not i.opcode.endswith("-done"):
            yield _Run(i, times, trips, owner)


def _parts(instructions: Sequence[Instruction], tags: Sequence[Tag]) -> dict[int, int]:
    """The equations that these instructions are of, and how much of each: instructions that compute, many for its own."""
    parts: dict[int, int] = {}
    for i in instructions:
        if i.tag is not None and i.opcode not in ("parameter", "tuple", "get-tuple-element"):
            score = 0 if i.opcode in _MOVES else CORE if i.opcode in CORES and _is_named(i, i.tag, tags) else 1
            parts[i.tag] = parts.get(i.tag, 0) + score
    return parts


def _is_named(i: Instruction, tag: int | None, tags: Sequence[Tag]) -> bool:
    """Whether an equation is named for what this instruction does."""
    return tag is not None and str(tags[tag].row.eqn.primitive).startswith(CORES[i.opcode])


def _named(
    core: Instruction, kernel: Instruction, tags: Sequence[Tag], neighbours: _Neighbours, done: set[int]
) -> int | None:
    """The equation of a product or convolution that has another's name: that of its transpose, of the loop around, or none."""
    near, front = [], [] if core.tag is None else [core.tag]
    for _ in range(4):  # a reader is a transpose or two away
        front = [p for t in front for p in tags[t].parents]
        near += front
    near += [t for i in neighbours.around(core, kernel) for t in neighbours.known.get(i.name, ()) or _of(i)]
    found = [t for t in near if _is_named(core, t, tags)]
    return next((t for t in found if t not in done), next(iter(found), None))


def _of(i: Instruction) -> list[int]:
    return [] if i.tag is None else [i.tag]


class _Neighbours(NamedTuple):
    """What stands near an instruction in the program."""

    module: Module
    known: dict[str, list[int]]  # the equations in each kernel

    def of(self, instruction: Instruction) -> list[int]:
        """The equations that something belongs to that XLA added: those of what reads it, else of what it reads."""
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
                if tags := self.known.get(i.name) or _of(i):
                    return tags
        return []

    def around(self, *instructions: Instruction) -> list[Instruction]:
        """What they read and what reads them, the nearest first."""
        seen, front = {i.name: i for i in instructions}, list(instructions)
        for _ in range(4):
            near = [self.module.by_name[name] for i in front for name in i.operands]
            near += [reader for i in front for reader in self.module.readers[i.name]]
            front = list({i.name: i for i in near if i.name not in seen}.values())
            seen |= {i.name: i for i in front}
        return list(seen.values())


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
