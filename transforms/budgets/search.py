"""Which nodes to keep: a search on the simulated peak.

A simulation runs the two parts as `emission` lays them out. The search starts from what keeps everything, and from what keeps
only the values between segments of stages. It drops nodes of one kind together, best ratio of bytes above the budget to
seconds first, and then keeps again what has room.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .joint import Joint


class Choice(NamedTuple):
    """What is kept.

    Attributes:
      saved: nodes that the forward part keeps for the backward part.
      held: nodes that are kept from the stage that computes them again to the last that reads them; None for all.
    """

    saved: frozenset[int]
    held: frozenset[int] | None = None


class Outcome(NamedTuple):
    """What a choice costs: the peak in bytes, seconds of what is computed again, and bytes above the budget, over all equations."""

    peak: int
    seconds: float
    excess: float


class Simulation:
    """The memory and time of choices, as they would be if equations ran in their order."""

    def __init__(self, joint: Joint):
        self.joint = joint
        self.sizes = np.array([node.bytes for node in joint.nodes], np.int64)
        self.last_forward = np.array(joint.last_forward, np.int64)
        self.runs = 0

    def __call__(self, choice: Choice, budget: float) -> Outcome:
        joint, nodes = self.joint, self.joint.nodes
        self.runs += 1
        count = len(joint.backward_bytes)
        begin = [0] * (count + 1)
        bumps: list[tuple[int, int]] = []
        available, born, last = set(choice.saved), dict.fromkeys(choice.saved, 0), {}
        cost = 0.0
        done: set[int] = set()
        for stage in joint.stages:
            again: set[int] = set()
            todo = [v for v in stage.reads if v not in available]
            while todo:
                v = todo.pop()
                if v in again:
                    continue
                again.add(v)
                for s in nodes[v].sources:
                    if s in available:
                        last[s] = max(last.get(s, 0), stage.start)
                    elif s not in again:
                        todo.append(s)
            for v, at in stage.reads.items():
                if v in available:
                    last[v] = at
            if not again:
                continue
            chain = sorted(again)
            cost += sum(nodes[v].seconds for v in chain if nodes[v].is_run or v in done)
            done |= again
            readers: dict[int, int] = defaultdict(int)
            for v in chain:
                for s in nodes[v].sources:
                    if s in again:
                        readers[s] += 1
            live = most = stays = 0
            for v in chain:
                live += nodes[v].bytes
                most = max(most, live)
                is_held = choice.held is None or v in choice.held
                if v in stage.reads or is_held:
                    stays += nodes[v].bytes
                    readers[v] = -1
                    if is_held:
                        available.add(v)
                        born[v], last[v] = stage.start, stage.reads.get(v, stage.start)
                    else:
                        begin[stage.start] += nodes[v].bytes
                        begin[stage.reads[v] + 1] -= nodes[v].bytes
                for s in nodes[v].sources:
                    if s in again and readers[s] > 0:
                        readers[s] -= 1
                        if not readers[s]:
                            live -= nodes[s].bytes
            bumps.append((stage.start, most - stays))
        for v, at in last.items():
            begin[born[v]] += nodes[v].bytes
            begin[at + 1] -= nodes[v].bytes
        profile = joint.backward_bytes + np.cumsum(begin[:-1])
        if bumps:
            at, extra = map(list, zip(*bumps, strict=True))
            profile[at] += extra
        before = self._forward(choice.saved)
        peak = int(max(profile.max(initial=0), before.max(initial=0)))
        excess = float(np.maximum(profile - budget, 0).sum() + np.maximum(before - budget, 0).sum())
        return Outcome(peak, cost, excess)

    def _forward(self, saved: frozenset[int]) -> np.ndarray:
        """What is alive at each node of the forward part."""
        kept = np.fromiter(saved, np.int64, len(saved))
        more = np.zeros(len(self.sizes) + 1, np.int64)
        np.add.at(more, self.last_forward[kept] + 1, self.sizes[kept])
        return self.joint.forward_bytes + np.cumsum(more[:-1])


def everything(joint: Joint) -> frozenset[int]:
    """All nodes that the backward part reads, and those that cannot be computed again."""
    return frozenset(s for stage in joint.stages for s in stage.reads) | pinned(joint)


def pinned(joint: Joint) -> frozenset[int]:
    return frozenset(k for k, node in enumerate(joint.nodes) if node.is_pinned)


def segments(joint: Joint, count: int) -> frozenset[int]:
    """The nodes that are alive between `count` segments of the forward part, cut where few bytes are alive."""
    nodes, last, n = joint.nodes, joint.last_forward, len(joint.nodes)
    alive = np.zeros(n + 1, np.int64)
    for k, node in enumerate(nodes):
        if node.is_run and last[k] > k:
            alive[k] += node.bytes
            alive[last[k]] -= node.bytes
    crossing = np.cumsum(alive[:-1])  # after each node
    work = np.cumsum([node.bytes for node in nodes], dtype=float)
    saved = set(pinned(joint))
    for k in range(1, count):
        aim, reach = work[-1] * k / count, work[-1] / count / 2
        near = [i for i in range(n) if abs(work[i] - aim) <= reach and crossing[i]]
        if not near:
            continue
        least = min(crossing[i] for i in near)
        cut = min((i for i in near if crossing[i] == least), key=lambda i: abs(work[i] - aim))
        saved |= {s for s in range(cut + 1) if nodes[s].is_run and last[s] > cut}
    return frozenset(saved)


class Search:
    """Choices within a budget."""

    def __init__(self, joint: Joint):
        self.joint, self.simulate = joint, Simulation(joint)
        self.kinds: dict[object, list[int]] = defaultdict(list)
        for k, node in enumerate(joint.nodes):
            if not node.is_pinned:
                self.kinds[node.kind].append(k)
        self.pinned = pinned(joint)

    @cached_property
    def starts(self) -> list[Choice]:
        """What keeps everything, and what keeps only the values between segments.

        Of what a segment computes again, all is held, or the values between its stages, or nothing.
        """
        counts = sorted({round(2 ** (k / 2)) for k in range(2, 12)})
        found = dict.fromkeys(segments(self.joint, n) for n in counts if n <= len(self.joint.stages))
        ends = segments(self.joint, len(self.joint.stages))
        each = [Choice(saved, held) for held in (None, ends, frozenset[int]()) for saved in found]
        return [Choice(everything(self.joint)), *each]

    def best(self, budget: float) -> tuple[Choice, Outcome] | None:
        """The cheapest choice found within a budget."""
        found = []
        for start in self.starts:
            choice = self.refilled(self.reduced(start, budget), budget)
            outcome = self.simulate(choice, budget)
            if outcome.peak <= budget:
                found.append((outcome.seconds, len(found), choice, outcome))
        return min(found)[2:] if found else None

    def reduced(self, choice: Choice, budget: float) -> Choice:
        """Drop nodes until the peak fits, or nothing helps."""
        here = self.simulate(choice, budget)
        scores = dict.fromkeys(self.kinds, math.inf)
        while here.excess > 0:
            best = None
            # What a kind is worth falls as others go, nearly always: so those that were worth less before wait.
            for kind in sorted(scores, key=lambda k: -scores[k]):
                if best and scores[kind] <= scores[best[0]]:
                    break
                members = [k for k in self.kinds[kind] if k in choice.saved]
                if not members:
                    scores[kind] = -math.inf
                    continue
                without = choice._replace(saved=choice.saved.difference(members))
                there = self.simulate(without, budget)
                scores[kind] = (here.excess - there.excess) / (there.seconds - here.seconds + TINY_S)
                if there.excess < here.excess and (best is None or scores[kind] > scores[best[0]]):
                    best = kind, members, without, there
            if best is None:
                break
            kind, members, choice, here = best
            if here.excess == 0:
                return self._kept(choice, members, budget)
        return choice

    def _kept(self, choice: Choice, members: Sequence[int], budget: float) -> Choice:
        """Keep as many of the last of `members` as fit: what is computed again late is so while little else is alive."""
        fits = lambda n: self.simulate(choice._replace(saved=choice.saved.union(members[len(members) - n :])), budget).excess == 0
        low, high = 0, len(members)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return choice._replace(saved=choice.saved.union(members[len(members) - low :]))

    def refilled(self, choice: Choice, budget: float) -> Choice:
        """Keep again what has room, the most seconds per byte first."""
        worth = lambda kind: -self.joint.nodes[self.kinds[kind][0]].seconds / (self.joint.nodes[self.kinds[kind][0]].bytes + 1)
        here = self.simulate(choice, budget)
        for kind in sorted(self.kinds, key=worth):
            members = [k for k in self.kinds[kind] if k not in choice.saved]
            if members:
                kept = self._kept(choice, members, budget)
                there = self.simulate(kept, budget)
                if there.peak <= budget and there.seconds < here.seconds:
                    choice, here = kept, there
        return choice


TINY_S = 1e-9
