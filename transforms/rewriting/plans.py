"""The plan of `replace` for each level of a graph: the matches to replace, and the nodes that are dead then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core import _jax, subjaxprs
from .matching import MAX_INLINED_EQNS, Keys, Level, Node, Value, View, matches


class Form(NamedTuple):
    """The pattern, traced for one choice of types."""

    view: View
    inputs: list[Value]
    size: int  # the number of values that its outputs depend on
    tree: Any
    name: str


class Match(NamedTuple):
    """An occurrence of a form: its inputs, its outputs, and all nodes that compute the outputs."""

    form: Form
    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]


@dataclass(eq=False)
class Plan:
    """What becomes of a level.

    Attributes:
      matches: the match to replace, by the first node that computes an output of it. replaced: the outputs of all matches.
      opened: the calls that are inlined. gone: the nodes that nothing needs any more.
      count, at: the number of matches and their lines and scopes, those in sub-jaxprs too.
      staged: the new sub-jaxprs, a memo of the pass that evaluates the plan.
    """

    view: View
    matches: dict[Node, Match] = field(default_factory=dict)
    replaced: set[Value] = field(default_factory=set)
    opened: set[Level] = field(default_factory=set)
    gone: set[Node] = field(default_factory=set)
    count: int = 0
    at: dict[tuple[str, str], None] = field(default_factory=dict)
    staged: dict[Any, dict[Any, Any]] = field(default_factory=dict)

    def take(self, match: Match) -> bool:
        """Enter a match, unless it overlaps an earlier one, or an input comes after its first output."""
        first = min((v.node for v in match.outputs), key=lambda node: node.at)
        overlaps = any(v in self.replaced for node in match.nodes for v in node.outputs)
        if overlaps or any(v.node and v.node.at >= first.at for v in match.inputs):
            return False
        self.matches[first] = match
        self.replaced.update(match.outputs)
        self.opened.update(call for node in match.nodes for call in node.calls)
        for value in match.inputs:
            value.users.append(None)
        return True

    def finish(self) -> None:
        """Find the dead nodes, count the matches and note their lines."""
        for node in reversed(self.view.nodes):  # invariant: `gone` has the dead nodes after this one
            if self._is_gone(node):
                self.gone.add(node)
        self.count = len(self.matches)
        for node in self.view.nodes:
            eqns = [*(call.eqn for call in node.calls), node.eqn]
            scopes = _joined(*map(_jax.scope_of, eqns))
            if node in self.matches:
                self.at[where(eqns), scopes] = None
            for plan in node.plans if node not in self.gone else ():
                self.count += plan.count
                self.at.update(((line, _joined(scopes, below)), None) for line, below in plan.at)

    def _is_gone(self, node: Node) -> bool:
        if node.eqn.effects or not self.opened.issuperset(node.calls) or not any(v.users for v in node.outputs):
            return False
        is_dead = lambda user: user is node or user in self.gone or user in self.opened
        return all(all(map(is_dead, v.users)) for v in node.outputs if not self.is_new(node, v))

    def is_new(self, node: Node, value: Value) -> bool:
        """Whether a node's output comes from a replacement."""
        return value in self.replaced and value.node is node


class Planner:
    """Plans level by level, sub-jaxprs first; each sub-jaxpr once per constants of its inputs."""

    def __init__(self, keys: Keys, forms: list[Form]):
        self.keys = keys
        self.roots: dict[int, list[Form]] = {}
        for form in sorted(forms, key=lambda form: -form.size):  # the largest match first
            self.roots.setdefault(form.view.level.outputs[0].node.key, []).append(form)
        self.memo: dict[Any, Plan] = {}

    def plan(self, jaxpr: Any, consts: Sequence[Any]) -> Plan:
        """The plan of a closed jaxpr; `consts` has for each input its constant, or None."""
        key = (id(jaxpr.jaxpr), *(None if c is None else self.keys.const(c) for c in (*jaxpr.consts, *consts)))
        if key not in self.memo:
            self.memo[key] = plan = Plan(View(self.keys, jaxpr, consts, self._plan_bodies))
            for node in plan.view.nodes:
                any(map(plan.take, self._matches(plan.view, node)))
            plan.finish()
        return self.memo[key]

    def _matches(self, view: View, root: Node) -> Iterator[Match]:
        for form in self.roots.get(root.key, ()):
            for bound in matches(form.view, view, root):
                nodes = [v.node for p, v in bound.items() if p.node]
                outputs = [bound[v] for v in form.view.level.outputs]
                yield Match(form, [bound[v] for v in form.inputs], outputs, nodes)

    def _plan_bodies(self, eqn: Any, operands: list[Value]) -> list[Plan] | None:
        """The plans of an equation's sub-jaxprs; None for a small plain jit without matches, or with nothing but matches."""
        consts = [[v and v.const for v in values] for values in subjaxprs.invariant_operands(eqn, operands)]
        plans = [self.plan(body.jaxpr, c) for body, c in zip(subjaxprs.bodies(eqn), consts, strict=True)]
        if not subjaxprs.is_plain(eqn):
            return plans
        n_nodes = len(plans[0].view.nodes)
        is_small = n_nodes <= MAX_INLINED_EQNS
        return None if is_small and (not plans[0].count or len(plans[0].gone) == n_nodes) else plans


def _joined(*scopes: str) -> str:
    return "/".join(filter(None, scopes))


def where(eqns: Sequence[Any]) -> str:
    """The user's line of the last equation that has one; the equations before it are the calls around it."""
    return next(filter(None, map(_jax.line_of, reversed(eqns))), "an unknown line")
