"""Which nodes to keep: a search on the simulated peak.

The search starts from what keeps everything, and from what keeps only the values between segments of stages. It drops nodes
of one kind together, best ratio of bytes above the budget to seconds first: from what is saved, then from what is held of
what is computed again. Last, it keeps again what has room.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .joint import Joint
from .simulation import Choice, Outcome, Simulation

TINY_S = 1e-9
PARTS = 4  # of a segment, between which values may be held
EQUATIONS = 3000  # in larger programs less is tried
HURRIED = 0.5  # with less effort, the first choice found is taken
STARTS = 2  # of each kind that are tried
POLISHED = 3  # of the best
SINGLES = 200  # nodes that are tried one by one in the end
LITTLE = 0.3  # of what a node would be worth that is not kept
ENOUGH = 0.999


def everything(joint: Joint) -> frozenset[int]:
    """All nodes that the backward part reads, and those that cannot be computed again."""
    return frozenset(joint.whole.reads) | pinned(joint)


def pinned(joint: Joint) -> frozenset[int]:
    """The nodes that are computed only once."""
    return frozenset(k for k, node in enumerate(joint.nodes) if node.is_pinned)


def segments(joint: Joint, count: int) -> frozenset[int]:
    """The nodes that are alive between `count` segments of the forward part, cut where few bytes are alive."""
    nodes, last, n = joint.nodes, joint.last_forward, len(joint.nodes)
    if not nodes:
        return frozenset()
    alive = np.zeros(n + 1, np.int64)
    for k, node in enumerate(nodes):
        if node.is_run and last[k] > k:
            alive[k] += node.bytes
            alive[last[k]] -= node.bytes
    crossing = np.cumsum(alive[:-1])  # after each node
    work = np.cumsum([node.bytes for node in nodes], dtype=float)
    is_run, final = np.array([node.is_run for node in nodes], bool), np.array(last)
    saved = set(pinned(joint))
    for k in range(1, count):
        aim, reach = work[-1] * k / count, work[-1] / count / 2
        near = np.flatnonzero((abs(work - aim) <= reach) & (crossing != 0))
        if len(near):
            least = near[crossing[near] == np.min(crossing[near])]
            cut = least[abs(work[least] - aim).argmin()]
            saved.update(np.flatnonzero(is_run[: cut + 1] & (final[: cut + 1] > cut)).tolist())
    return frozenset(saved)


class Search:
    """Choices within a budget."""

    def __init__(self, joint: Joint):
        self.joint, self.simulate = joint, Simulation(joint, is_new=True)
        self.kinds: dict[object, list[int]] = defaultdict(list)
        for k, node in enumerate(joint.nodes):
            if not node.is_pinned:
                self.kinds[node.kind].append(k)
        self.pinned = pinned(joint)
        self.effort = EQUATIONS / (len(joint.eqns) + 1)  # a simulation takes as long as the program has equations

    @cached_property
    def starts(self) -> list[Choice]:
        """What keeps everything, and what keeps only the values between segments: of each kind those of the lowest peaks.

        Of what a segment computes again, all is held, or the values between its parts, or nothing.
        """
        counts = sorted({round(2 ** (k / 2)) for k in range(2, 12)})
        found = {
            segments(self.joint, n): segments(self.joint, PARTS * n) for n in counts if n <= len(self.joint.stages)
        }
        kinds = (
            [Choice(saved) for saved in found],
            [Choice(saved, held) for saved, held in found.items()],
            [Choice(saved, frozenset()) for saved in found],
        )
        peak = lambda choice: self.simulate(choice, 0).peak
        return [
            Choice(everything(self.joint)),
            *(c for kind in kinds for c in sorted(kind, key=peak)[: max(min(STARTS, int(self.effort)), 1)]),
        ]

    @cached_property
    def lowest(self) -> int:
        """The lowest peak of a start."""
        return min(self.simulate(start, 0).peak for start in self.starts)

    def best(self, budget: float) -> tuple[Choice, Outcome] | None:
        """The cheapest choice found within a budget."""
        found: list[tuple[float, int, Choice]] = []
        for start in self.starts:
            choice = self.refilled(self.leaner(self.reduced(start, budget), budget), budget)
            outcome = self.simulate(choice, budget)
            if outcome.peak <= budget:
                found.append((outcome.seconds, len(found), choice))
            if found and self.effort < HURRIED:
                break
        cheapest = [choice for _, _, choice in sorted(found)]
        rough = cheapest[: max(min(POLISHED, int(self.effort)), 1)]
        if self.effort >= 2:  # those that hold all gain the most
            rough += [choice for choice in cheapest if choice.held is None and choice not in rough]
        best = min((self.polished(choice, budget) for choice in rough), key=lambda pair: pair[1].seconds, default=None)
        free = self.joint.machine.held - 1
        if best and best[1].peak <= free < budget:  # it stays where memory takes no time: what has room there is kept
            best = self.polished(self.refilled(best[0], free), free)
        self.simulate.known.clear()
        self.simulate.chains.clear()
        return best

    def polished(self, choice: Choice, budget: float) -> tuple[Choice, Outcome]:
        """Exchange single nodes: drop those that are worth little by now, and keep those that then have room."""
        here = self.simulate(choice, budget)
        while self.effort >= 1:
            there = self._exchanged(choice, here, budget)
            outcome = self.simulate(there, budget)
            if outcome.peak > budget or outcome.seconds >= here.seconds * ENOUGH:
                break
            choice, here = there, outcome
        return choice, here

    def _exchanged(self, choice: Choice, here: Outcome, budget: float) -> Choice:
        nodes = self.joint.nodes
        worth = lambda k: nodes[k].seconds / (nodes[k].bytes + 1)
        rest = sorted((k for k in range(len(nodes)) if k not in choice.saved and nodes[k].is_run), key=worth)[-SINGLES:]
        largest = max((nodes[k].bytes for k in rest), default=0)
        best = max((worth(k) for k in rest if nodes[k].bytes >= largest / 100), default=0.0)
        for k in sorted(choice.saved - self.pinned, key=worth)[:SINGLES]:
            without = choice._replace(saved=choice.saved - {k})
            there = self.simulate(without, budget)
            if (there.seconds - here.seconds) / (nodes[k].bytes + 1) < LITTLE * best:
                choice, here = without, there
        for k in reversed(rest):
            more = choice._replace(saved=choice.saved | {k})
            there = self.simulate(more, budget)
            if there.peak <= budget and there.seconds < here.seconds:
                choice, here = more, there
        return choice

    def reduced(self, choice: Choice, budget: float) -> Choice:
        """Save less, and hold less of what is computed again, until the peak fits, or nothing helps."""
        choice = self._dropped("saved", choice, budget)
        if self.simulate(choice, budget).excess > 0:
            held = frozenset(range(len(self.joint.nodes))) if choice.held is None else choice.held
            choice = self._dropped("held", choice._replace(held=held - choice.saved), budget)
        return choice

    def _dropped(self, what: str, choice: Choice, budget: float) -> Choice:
        """`choice` without kinds of what is saved or held, the best ratio first, until the peak fits, or nothing helps."""
        here = self.simulate(choice, budget)
        scores = dict.fromkeys(self.kinds, math.inf)
        while here.excess > 0:
            best = None
            # What a kind is worth falls as others go, nearly always: so those that were worth less before wait.
            for kind in sorted(scores, key=lambda k: -scores[k]):
                if best and scores[kind] <= scores[best[0]]:
                    break
                members = [k for k in self.kinds[kind] if k in getattr(choice, what)]
                if not members:
                    scores[kind] = -math.inf
                    continue
                without = choice._replace(**{what: getattr(choice, what).difference(members)})
                there = self.simulate(without, budget)
                scores[kind] = (here.excess - there.excess) / (max(there.seconds - here.seconds, 0.0) + TINY_S)
                if there.excess < here.excess and (best is None or scores[kind] > scores[best[0]]):
                    best = kind, members, without, there
            if best is None:
                break
            kind, members, choice, here = best
            if here.excess == 0:
                return self._kept(what, choice, members, budget)
        return choice

    def leaner(self, choice: Choice, budget: float) -> Choice:
        """Drop what it takes longer to have memory for than to compute again."""
        here = self.simulate(choice, budget)
        for kind in sorted(self.kinds, key=self._worth):
            without = choice._replace(saved=choice.saved.difference(self.kinds[kind]))
            there = self.simulate(without, budget)
            if there.seconds < here.seconds and there.excess <= here.excess:
                choice, here = without, there
        return choice

    def _worth(self, kind: object) -> float:
        """The seconds per byte of a node."""
        node = self.joint.nodes[self.kinds[kind][0]]
        return node.seconds / (node.bytes + 1)

    def _kept(self, what: str, choice: Choice, members: Sequence[int], budget: float) -> Choice:
        """Save or hold as many of the last of `members` as fit: what is computed again late is so while little is alive."""
        more = lambda n: choice._replace(**{what: getattr(choice, what).union(members[len(members) - n :])})
        misfits = lambda n: self.simulate(more(n), budget).excess > 0
        if not misfits(len(members)):
            return more(len(members))
        return choice if misfits(1) else more(bisect_left(range(1, len(members)), True, key=misfits))

    def refilled(self, choice: Choice, budget: float) -> Choice:
        """Save and hold again what has room, the most seconds per byte first."""
        here = self.simulate(choice, budget)
        for what in ("saved", "held"):
            if getattr(choice, what) is None:
                continue
            for kind in sorted(self.kinds, key=self._worth, reverse=True):
                members = [k for k in self.kinds[kind] if k not in choice.saved and k not in getattr(choice, what)]
                if members:
                    kept = self._kept(what, choice, members, budget)
                    there = self.simulate(kept, budget)
                    if there.peak <= budget and there.seconds < here.seconds:
                        choice, here = kept, there
        return choice
