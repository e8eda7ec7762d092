"""Scopes as boxes: the equations of one level in the boxes of their scopes, such that data flows one way between boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

NodeId = int | None


class Boxes:
    """The boxes of one level, filled in program order.

    Invariant: the dependencies among the children of every box have no cycle. So a scope is one box, unless an equation of it
    depends on the box through something outside of it: that equation starts another box of the same name.
    """

    def __init__(self, new_box: Callable[[str, NodeId], int], root: NodeId) -> None:
        self.new_box, self.root = new_box, root
        self.parents: dict[NodeId, NodeId] = {}
        self.children: dict[NodeId, list[int]] = defaultdict(list)
        self.latest: dict[tuple[NodeId, str], int] = {}  # (parent, name) -> the last box of this name in the parent
        self.bits: dict[NodeId, int] = {}  # one bit per box
        self.dependencies: dict[NodeId, int] = {}  # node -> bits of the sibling boxes that it depends on, transitively

    def box(self, scopes: Sequence[str], makers: Iterable[int]) -> NodeId:
        """The box for an equation in these scopes that reads values of `makers`."""
        parent = self.root
        for name in scopes:
            box = self.latest.get((parent, name))
            inputs = self._ancestors_in(parent, makers)
            if box is None or any(self.dependencies[node] & self.bits[box] for node in inputs if node != box):
                box = self.latest[parent, name] = self.new_box(name, parent)
                self.bits[box] = 1 << len(self.bits)
                self._place(box, parent)
            self._depend(box, parent, inputs)
            parent = box
        return parent

    def add(self, node: int, parent: NodeId, makers: Iterable[int]) -> None:
        """Place an equation in its box."""
        self._place(node, parent)
        self._depend(node, parent, self._ancestors_in(parent, makers))

    def _place(self, node: int, parent: NodeId) -> None:
        self.parents[node], self.dependencies[node] = parent, 0
        self.children[parent].append(node)

    def _ancestors_in(self, parent: NodeId, makers: Iterable[int]) -> set[NodeId]:
        """The children of `parent` that are or contain one of the makers."""
        ancestors = set()
        for maker in makers:
            node: NodeId = maker
            while node in self.parents and self.parents[node] != parent:
                node = self.parents[node]
            if node in self.parents:
                ancestors.add(node)
        return ancestors

    def _depend(self, node: int, parent: NodeId, inputs: Iterable[NodeId]) -> None:
        dependencies = self.dependencies[node]
        for sibling in inputs:
            if sibling != node:
                dependencies |= self.dependencies[sibling] | self.bits.get(sibling, 0)
        if dependencies != self.dependencies[node]:
            self.dependencies[node] = dependencies
            if bit := self.bits.get(node):
                for sibling in self.children[parent]:
                    if self.dependencies[sibling] & bit:
                        self.dependencies[sibling] |= dependencies
