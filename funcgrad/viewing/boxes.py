"""Scopes as boxes: which equations of one level stand in which box, so that data flows one way between boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

Node = int | None


class Boxes:
    """The boxes of one level, filled in program order.

    A scope is one box wherever it can be. Where an equation depends, through something outside of the box, on what the box
    makes, it starts another one of the same name: otherwise the two would wait for each other.
    """

    def __init__(self, new: Callable[[str, Node], int], root: Node) -> None:
        self.new, self.root = new, root
        self.parents: dict[Node, Node] = {}
        self.latest: dict[tuple[Node, str], int] = {}  # the box of a name in a box
        self.bits: dict[Node, int] = {}  # one per box
        self.above: dict[Node, int] = {}  # by node: all boxes beside it that it depends on
        self.inside: dict[Node, list[int]] = defaultdict(list)

    def box(self, scopes: Sequence[str], makers: Iterable[int]) -> Node:
        """The box for an equation in these scopes, which reads what `makers` make."""
        parent = self.root
        for name in scopes:
            box = self.latest.get((parent, name))
            before = self._beside(parent, makers)
            if box is None or any(self.above[node] & self.bits[box] for node in before if node != box):
                box = self.latest[parent, name] = self.new(name, parent)
                self.bits[box] = 1 << len(self.bits)
                self._place(box, parent)
            self._depend(box, parent, before)
            parent = box
        return parent

    def add(self, node: int, parent: Node, makers: Iterable[int]) -> None:
        """Place an equation in its box."""
        self._place(node, parent)
        self._depend(node, parent, self._beside(parent, makers))

    def _place(self, node: int, parent: Node) -> None:
        self.parents[node], self.above[node] = parent, 0
        self.inside[parent].append(node)

    def _beside(self, parent: Node, makers: Iterable[int]) -> set[Node]:
        """What stands in `parent` and holds, or is, one of the makers."""
        found = set()
        for maker in makers:
            node: Node = maker
            while node in self.parents and self.parents[node] != parent:
                node = self.parents[node]
            if node in self.parents:
                found.add(node)
        return found

    def _depend(self, node: int, parent: Node, before: Iterable[Node]) -> None:
        above = self.above[node]
        for other in before:
            if other != node:
                above |= self.above[other] | self.bits.get(other, 0)
        if above != self.above[node]:
            self.above[node] = above
            if bit := self.bits.get(node):
                for other in self.inside[parent]:
                    if self.above[other] & bit:
                        self.above[other] |= above
