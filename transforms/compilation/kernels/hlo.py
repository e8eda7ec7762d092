"""The text of a compiled program, as XLA prints it: computations, and their instructions in the order in which they run.

Source: the HLO text format, https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

# What takes no time: names, views and constants.
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
      operands: the names of what it reads.
      attributes: everything behind the operands.
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
        branches = [name.strip(" %") for found in _BRANCHES.findall(self.attributes) for name in found.split(",")]
        return (
            *sorted(_CALLED.findall(self.attributes), key=lambda name: f"condition=%{name}" in self.attributes),
            *branches,
        )

    @cached_property
    def tag(self) -> int | None:
        """The number of the innermost scope fg[number] of the operation that it was made from; None if XLA made it."""
        found = re.findall(r"fg\[(\d+)\]", self._quoted(r'op_name="((?:[^"\\]|\\.)*)"'))
        return int(found[-1]) if found else None

    @cached_property
    def target(self) -> str:
        """The function that a custom call calls, or the library that a fusion is handed to."""
        return self._quoted(r'custom_call_target="([^"]*)"') or self._quoted(r'"fusion_config":\{[^}]*"kind":"([^"]*)"')

    @cached_property
    def trips(self) -> int | None:
        """How often a loop runs, if XLA knows."""
        found = self._quoted(r'"known_trip_count":\{"n":"(\d+)"')
        return int(found) if found else None

    def _quoted(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Module:
    """A compiled program: its name, computations, and the one that is entered."""

    name: str
    computations: dict[str, list[Instruction]]
    entry: str

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions; their names differ in all computations."""
        return {i.name: i for body in self.computations.values() for i in body}

    @cached_property
    def readers(self) -> dict[str, list[Instruction]]:
        """The instructions that read the result of one."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for i in self.by_name.values():
            for name in i.operands:
                found[name].append(i)
        return found

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """An instruction and everything that it calls, at any depth."""
        called = [i for name in instruction.called for i in self.computations.get(name, ())]
        return [instruction, *(inner for i in called for inner in self.inside(i))]


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
        elif name and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
            type_, rest = _split(found[2])
            opcode, _, rest = rest.partition("(")
            operands, attributes = _split(f"({rest}")
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            computations[name].append(Instruction(found[1], opcode, type_, names, attributes))
    return Module(module, computations, entry)


def _split(text: str) -> tuple[str, str]:
    """A text at the end of its first type or of its first pair of parentheses."""
    depth = 0
    for k, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and (c == " " or (c == ")" and text[0] == "(")):
            return text[: k + 1].strip(), text[k + 1 :].strip()
    return text, ""


def _nbytes(dtype: str, shape: str) -> float:
    return math.prod(int(n.lstrip("<=")) for n in shape.split(",") if n) * _itemsize(dtype)


def _itemsize(dtype: str) -> float:
    """The bytes of one element, as the dtype's name says; tokens have none."""
    bits = re.search(r"\d+", dtype)
    return 1 if dtype == "pred" else int(bits[0]) / 8 if bits else 0
