"""The text of a compiled program, as XLA prints it: computations, and their instructions in the order in which they run.

Source: the HLO text format, https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

# Opcodes that take no time: names, views and constants.
FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
)
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      type: of its result, as "f32[8,16]{1,0}" or a tuple of such.
      operands: the names of the instructions that it reads.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def nbytes(self) -> float:
        """The bytes of its result."""
        return sum(_nbytes(dtype, shape) for dtype, shape in _ARRAY.findall(self.type))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls, a loop's body before its condition."""
        branches = [name.strip(" %") for names in _BRANCHES.findall(self.attributes) for name in names.split(",")]
        is_condition = lambda name: f"condition=%{name}" in self.attributes
        return (*sorted(_CALLED.findall(self.attributes), key=is_condition), *branches)

    @cached_property
    def tag(self) -> int | None:
        """The number of the innermost scope fg[number] in its metadata; None for an instruction that XLA added."""
        numbers = re.findall(r"fg\[(\d+)\]", self._group(r'op_name="((?:[^"\\]|\\.)*)"'))
        return int(numbers[-1]) if numbers else None

    @cached_property
    def target(self) -> str:
        """The function that a custom call calls, or the library that runs a fusion."""
        return self._group(r'custom_call_target="([^"]*)"') or self._group(r'"fusion_config":\{[^}]*"kind":"([^"]*)"')

    @cached_property
    def trips(self) -> int | None:
        """How often a loop runs, if XLA knows."""
        trips = self._group(r'"known_trip_count":\{"n":"(\d+)"')
        return int(trips) if trips else None

    def _group(self, pattern: str) -> str:
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclass(frozen=True)
class Module:
    """A compiled program: its name, its computations by name, and the name of the outermost one."""

    name: str
    computations: dict[str, list[Instruction]]
    entry: str

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions of all computations; no two have the same name."""
        return {i.name: i for body in self.computations.values() for i in body}

    @cached_property
    def readers(self) -> dict[str, list[Instruction]]:
        """Name of an instruction -> the instructions that read its result."""
        readers: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for i in self.by_name.values():
            for name in i.operands:
                readers[name].append(i)
        return readers

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """An instruction and those of the computations that it calls, at any depth."""
        called = [i for name in instruction.called for i in self.computations.get(name, ())]
        return [instruction, *(nested for i in called for nested in self.inside(i))]


def parse(text: str) -> Module:
    """The program in `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if line.startswith("HloModule "):
            module = line.split()[1].rstrip(",")
        elif line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) .*->", line)):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
            type_, rest = _split(match[2])
            opcode, _, rest = rest.partition("(")
            operands, attributes = _split(f"({rest}")
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            computations[name].append(Instruction(match[1], opcode, type_, names, attributes))
    return Module(module, computations, entry)


def _split(text: str) -> tuple[str, str]:
    """A text, cut behind its first type or its first pair of parentheses."""
    depth = 0
    for k, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and (c == " " or (c == ")" and text[0] == "(")):
            return text[: k + 1].strip(), text[k + 1 :].strip()
    return text, ""


def _nbytes(dtype: str, shape: str) -> float:
    """The bytes of an array; the name of a dtype holds its bits, tokens have none."""
    bits = re.search(r"\d+", dtype)
    itemsize = 1 if dtype == "pred" else int(bits[0]) / 8 if bits else 0
    return math.prod(int(n.lstrip("<=")) for n in shape.split(",") if n) * itemsize
