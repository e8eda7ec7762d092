"""Kernels: the instructions of a compiled program that run, the kind of each, and its equations."""

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

# Opcodes of core instructions, which do the work of an equation that became several instructions. The equation is named after
# them, as reduce_window_sum after reduce-window.
_CORES = frozenset(["dot", "convolution", "reduce", "reduce-window", "scatter", "gather", "sort", "fft", "custom-call"])
_PREFIXES = {"convolution": "conv", "custom-call": ""}
CORE_SCORE = 1000  # of a core instruction; others have 1, moves 0
_MOVES = frozenset(("copy", "bitcast", "transpose", "reshape", "broadcast", "slice", "concatenate", "pad"))
# a part of the target of a call or fusion -> library
_LIBRARIES = {"onednn": "oneDNN", "ynn": "YNN", "cublas": "cuBLAS", "cudnn": "cuDNN", "triton": "Triton"}
_LIBRARIES |= {"lapack": "LAPACK", "cusolver": "cuSOLVER", "ducc": "DUCC"}


@dataclass(frozen=True)
class Kernel:
    """An instruction of the compiled program that runs.

    Attributes:
      name: the instruction's, in the HLO.
      kind: "matmul", "convolution", "fusion", or the instruction's opcode.
      library: the library that it calls, as "YNN" or "cuBLAS"; "" for XLA's own code.
      equations: those that it computes a part of; for an instruction that XLA added, as a copy, those of its neighbours.
      times: how often it runs in a call; None in a loop of unknown length.
      work: FLOPs and transcendentals of its equations, and the bytes that it reads and writes, of all runs in a call; of one run
        if `times` is None.
      is_added: whether XLA added it.
      elapsed_s: seconds of all runs in a call; None if it was not measured.
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
        """As "matmul (YNN)"."""
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
        """Its roofline time on a machine, as a fraction of its time; None if it was not measured."""
        return of.bound(self.work).seconds / self.elapsed_s if self.elapsed_s else None


class _Run(NamedTuple):
    """An instruction that runs.

    Attributes:
      times: how often; None in a loop of unknown length.
      trips: the product of the trips of the loops around it that are equations.
      owner: the tag of the innermost loop, branch or call around it; () if there is none.
    """

    instruction: Instruction
    times: int | None
    trips: int
    owner: tuple[int, ...]


def kernels_of(module: Module, tags: Sequence[Tag]) -> list[Kernel]:
    """The kernels of a program, with the equations in each.

    The work of an equation belongs to the kernels with its core instruction, or else to the one with most of its instructions.
    """
    return _Attribution(module, tags).kernels()


class _Attribution:
    """The equations of each kernel.

    Attributes:
      runs: the kernels' instructions.
      scores: for each kernel tag -> score: the number of instructions of this equation, core instructions counted as many.
      tags_of: name of a kernel -> its tags, as XLA's metadata has them.
    """

    def __init__(self, module: Module, tags: Sequence[Tag]):
        self.module, self.tags = module, tags
        self.runs = list(self._running(module.entry))
        self.scores = [self._scores(module.inside(run.instruction)) for run in self.runs]
        self.tags_of = {run.instruction.name: list(s) for run, s in zip(self.runs, self.scores, strict=True)}
        self._score_unnamed_cores()

    def kernels(self) -> list[Kernel]:
        """One kernel per run; an equation's work is divided among the kernels with its highest score."""
        best: dict[int, int] = {}
        for tag, score in (item for scores in self.scores for item in scores.items()):
            best[tag] = max(best.get(tag, 0), score)
        workers: dict[int, list[int]] = {tag: [] for tag in best}
        for k, scores in enumerate(self.scores):
            for tag, score in scores.items():
                if score == best[tag] and (score >= CORE_SCORE or not workers[tag]):
                    workers[tag].append(k)
        kernels = []
        for k, (run, scores) in enumerate(zip(self.runs, self.scores, strict=True)):
            shares = {tag: run.trips / len(workers[tag]) for tag in scores if k in workers[tag]}
            works = ((self.tags[tag].row.once, share) for tag, share in shares.items())
            work = Work.sum(once.times(share) for once, share in works if once)
            read, written = (bytes_ * (run.times or 1) for bytes_ in _traffic(self.module, run.instruction))
            work = Work(work.flops, work.transcendentals, read, written)
            rows = tuple(self.tags[tag].row for tag in scores or self._nearest(run.instruction) or run.owner)
            name, kind = run.instruction.name, _kind(self.module, run.instruction)
            kernels.append(Kernel(name, *kind, rows, run.times, work, not scores))
        return kernels

    def _running(
        self, computation: str, times: int | None = 1, trips: int = 1, owner: tuple[int, ...] = ()
    ) -> Iterator[_Run]:
        for i in self.module.computations[computation]:
            if i.opcode in ("while", "conditional", "call", "async-start"):
                body_times, body_trips = times, trips
                if i.opcode == "while":
                    body_times = None if times is None or i.trips is None else times * i.trips
                    is_equation = i.tag is not None and subjaxprs.bodies(
                        self.tags[i.tag].row.eqn
                    )  # else XLA's own loop
                    body_trips *= (i.trips or 1) if is_equation else 1
                for name in i.called:
                    yield from self._running(name, body_times, body_trips, owner if i.tag is None else (i.tag,))
            elif i.opcode not in FREE and not i.opcode.endswith("-done"):
                yield _Run(i, times, trips, owner)

    def _scores(self, instructions: Sequence[Instruction]) -> dict[int, int]:
        scores: dict[int, int] = {}
        for i in instructions:
            if i.tag is not None and i.opcode not in ("parameter", "tuple", "get-tuple-element"):
                score = 0 if i.opcode in _MOVES else CORE_SCORE if self._is_core(i, i.tag) else 1
                scores[i.tag] = scores.get(i.tag, 0) + score
        return scores

    def _is_core(self, i: Instruction, tag: int | None) -> bool:
        """Whether an instruction is of the kind that the equation is named after."""
        prefix = _PREFIXES.get(i.opcode, i.opcode.replace("-", "_"))
        return i.opcode in _CORES and tag is not None and str(self.tags[tag].row.eqn.primitive).startswith(prefix)

    def _score_unnamed_cores(self) -> None:
        """Give products and convolutions whose tag is that of another equation to the equation that they compute."""
        done = {tag for scores in self.scores for tag, score in scores.items() if score >= CORE_SCORE}
        for run, scores in zip(self.runs, self.scores, strict=True):
            for core in self.module.inside(run.instruction):
                if core.opcode not in ("dot", "convolution") or self._is_core(core, core.tag):
                    continue
                nearby = [tag for tag in self._nearby(core, run.instruction) if self._is_core(core, tag)]
                tag = next((t for t in nearby if t not in done), next(iter(nearby), None))
                if tag is not None:
                    scores[tag] = scores.get(tag, 0) + CORE_SCORE
                    done.add(tag)

    def _nearby(self, core: Instruction, kernel: Instruction) -> list[int]:
        """The equations around an instruction, the nearest first: operands of its tag, then those of neighbouring kernels."""
        tags: list[int] = []
        frontier = _tags(core)
        for _ in range(4):  # a reader is a transpose or two away
            frontier = [parent for tag in frontier for parent in self.tags[tag].parents]
            tags += frontier
        seen, near = {i.name: i for i in (core, kernel)}, [core, kernel]
        for _ in range(4):
            around = [i for j in near for i in self._operands(j)]
            around += [reader for j in near for reader in self.module.readers[j.name]]
            near = list({i.name: i for i in around if i.name not in seen}.values())
            seen |= {i.name: i for i in near}
        return tags + [tag for i in seen.values() for tag in self.tags_of.get(i.name, ()) or _tags(i)]

    def _nearest(self, instruction: Instruction) -> list[int]:
        """The equations of the nearest readers of an instruction that XLA added, or else of its nearest operands."""
        readers = lambda i: self.module.readers[i.name]
        return self._first(instruction, readers) or self._first(instruction, self._operands)

    def _first(self, instruction: Instruction, step: Callable[[Instruction], Sequence[Instruction]]) -> list[int]:
        """The tags of the first tagged instruction in a breadth-first search."""
        seen, frontier = {instruction.name}, [instruction]
        while frontier:
            frontier = [i for j in frontier for i in step(j) if i.name not in seen]
            seen.update(i.name for i in frontier)
            for i in frontier:
                if tags := self.tags_of.get(i.name) or _tags(i):
                    return tags
        return []

    def _operands(self, i: Instruction) -> list[Instruction]:
        return [self.module.by_name[name] for name in i.operands]


def _tags(i: Instruction) -> list[int]:
    return [] if i.tag is None else [i.tag]


def _kind(module: Module, instruction: Instruction) -> tuple[str, str]:
    """The kind of a kernel, and the library that it calls."""
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
    """The bytes that a kernel reads and writes: of an array only the slice that it reads, or the update that it writes."""
    by_name = module.by_name
    if instruction.opcode != "fusion":
        return sum(by_name[name].nbytes for name in instruction.operands), instruction.nbytes
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
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    updates = (by_name[i.operands[1]] if i.opcode == "dynamic-update-slice" else i for i in results)
    return read, sum(i.nbytes for i in updates)
