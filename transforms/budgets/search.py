"""Which nodes to keep: a search on the simulated peak.

A simulation runs the two parts as `emission` lays them out. The search starts from what keeps everything, and from what keeps
only the values between segments of stages. It drops nodes of one kind together, best ratio of bytes above the budget to
seconds first: from what is saved, then from what is held of what is computed again. Last, it keeps again what has room.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .joint import Joint, Stage

TINY_S = 1e-9
PARTS = 4  # of a segment, between which values may be held
EQUATIONS = 3000  # in larger programs less is tried
HURRIED = 0.5  # with less effort, the first choice found is taken
STARTS = 2  # of each kind that are tried
POLISHED = 3  # of the best
SINGLES = 200  # nodes that are tried one by one in the end
LITTLE = 0.3  # of what a node would be worth that is not kept
ENOUGH = 0.999


class Choice(NamedTuple):
    """What is kept.

    Attributes:
      saved: nodes that the forward part keeps for the backward part.
      held: nodes that are kept from the stage that computes them again to the last that reads them; None for all.
      is_staged: whether each stage computes again what it reads. If not, all of that is computed at once.
    """

    saved: frozenset[int]
    held: frozenset[int] | None = None
    is_staged: bool = True

    def stages(self, joint: Joint) -> Sequence[Stage]:
        """The stages of the backward part."""
        return joint.stages if self.is_staged else [joint.whole]


class Outcome(NamedTuple):
    """What a choice comes to.

    Attributes:
      peak: in bytes.
      seconds: of what it computes again, and to take so much memory, or in the body of a loop to hand it on, on the nominal
        machine.
      excess: bytes above the budget, over all equations.
    """

    peak: int
    seconds: float
    excess: float


class Chain(NamedTuple):
    """What a stage computes again.

    Attributes:
      nodes: these.
      sources: nodes that are there already, and that these read.
      unread: of the nodes, those that only others of them may read.
      seconds: to compute all of them.
      bumps: by what is read in it alone, how much more is alive while it is computed than after it.
    """

    nodes: frozenset[int]
    sources: frozenset[int]
    unread: frozenset[int]
    seconds: float
    bumps: dict[frozenset[int], int]


class Simulation:
    """The memory and time of choices, as they would be if equations ran in their order.

    Args:
      joint: the program.
      is_new: whether it takes its memory anew, unlike the body of a loop. There, what stages hand on may count.
    """

    def __init__(self, joint: Joint, *, is_new: bool):
        self.joint, self.machine, self.is_new = joint, joint.machine, is_new
        self.sizes = [node.bytes for node in joint.nodes]
        self.seconds = [node.seconds for node in joint.nodes]
        self.sources = [node.sources for node in joint.nodes]
        self.not_run = frozenset(k for k, node in enumerate(joint.nodes) if not node.is_run)
        self.last_forward = np.array(joint.last_forward, np.int64)
        self.known: dict[tuple[Choice, float], Outcome] = {}
        self.chains: dict[tuple[int, int, frozenset[int]], Chain] = {}

    def __call__(self, choice: Choice, budget: float) -> Outcome:
        """The outcome of a choice."""
        if (choice, budget) not in self.known:
            self.known[choice, budget] = self._outcome(choice, budget)
        return self.known[choice, budget]

    def _outcome(self, choice: Choice, budget: float) -> Outcome:
        sizes, held = self.sizes_with(choice.saved), choice.held
        change = [0] * (len(self.joint.backward_bytes) + 1)
        chains: list[tuple[Stage, Chain]] = []
        born, last = dict.fromkeys(choice.saved, 0), dict[int, int]()
        done: set[int] = set()
        cost = 0.0
        for stage in choice.stages(self.joint):
            start, _, reads = stage
            if missing := frozenset([v for v in reads if v not in born]):  # quicker than the difference of two views
                chain = self._chain(stage, missing, born)
                last.update(dict.fromkeys(chain.sources, start))
                cost += chain.seconds - sum(self.seconds[v] for v in (chain.nodes & self.not_run) - done)
                done |= chain.nodes
                chains.append((stage, chain))
                kept = chain.nodes if held is None else chain.nodes & held
                born.update(dict.fromkeys(kept, start))
                last.update(dict.fromkeys(kept, start))
                for v in missing - kept:
                    change[start] += sizes[v]
                    change[reads[v] + 1] -= sizes[v]
            last.update(reads)
        bumps: list[tuple[int, int]] = []
        crossing = 0
        for (start, stop, _), chain in chains:
            if self.machine.is_fusing and not self.is_new:
                crossing += sum(sizes[v] for v in chain.nodes if v in born and last[v] >= stop)
            passing = frozenset(v for v in chain.unread if v not in born or last[v] == start)
            if passing:
                for v in passing & born.keys():
                    del born[v]
                bumps.append((start, self._bump(chain, passing)))
        for v, at in born.items():
            if v in last:
                change[at] += sizes[v]
                change[last[v] + 1] -= sizes[v]
        profile = self.joint.backward_bytes + np.cumsum(change[:-1])
        for at, extra in bumps:
            profile[at] += extra
        before = self._forward(choice.saved, sizes)
        peak = int(max(profile.max(initial=0), before.max(initial=0)))
        excess = np.maximum(profile - budget, 0).sum() + np.maximum(before - budget, 0).sum()
        cost += self.machine.taken(peak) if self.is_new else self.machine.moved(crossing, crossing)
        return Outcome(peak, cost, float(excess))

    def _chain(self, stage: Stage, missing: frozenset[int], known: dict[int, int]) -> Chain:
        """What a stage must compute for what it misses; mostly what it did in the choice before."""
        key = stage.start, stage.stop, missing
        chain = self.chains.get(key)
        if chain and known.keys() >= chain.sources and known.keys().isdisjoint(chain.nodes):
            return chain
        found, read, todo = set(missing), set[int](), list(missing)
        while todo:
            for s in self.sources[todo.pop()]:
                if s in known:
                    read.add(s)
                elif s not in found:
                    found.add(s)
                    todo.append(s)
        seconds, unread = math.fsum(self.seconds[v] for v in found), frozenset(found - stage.reads.keys())
        self.chains[key] = Chain(frozenset(found), frozenset(read), unread, seconds, {})
        return self.chains[key]

    def _bump(self, chain: Chain, passing: frozenset[int]) -> int:
        """By how much more is alive while a chain is computed than after it; what is `passing` is read in it alone."""
        if passing not in chain.bumps:
            readers: dict[int, int] = {}
            for v in chain.nodes:
                for s in self.sources[v]:
                    readers[s] = readers.get(s, 0) + 1
            live = most = 0
            for v in sorted(chain.nodes):
                live += self.sizes[v]
                most = max(most, live)
                for s in self.sources[v]:
                    readers[s] -= 1
                    if not readers[s] and s in passing:
                        live -= self.sizes[s]
            chain.bumps[passing] = most - live
        return chain.bumps[passing]

    def sizes_with(self, saved: frozenset[int]) -> list[int]:
        """The bytes of each node; of the results of what is saved only those that something reads later."""
        sizes = self.sizes
        for k in saved & self.joint.results.keys():
            sizes = [*sizes] if sizes is self.sizes else sizes
            sizes[k] = sum(r.bytes for r in self.joint.results[k] if r.is_read_back or not r.readers <= saved)
        return sizes

    def _forward(self, saved: frozenset[int], sizes: Sequence[int]) -> np.ndarray:
        """What is alive at each node of the forward part."""
        kept = np.fromiter(saved, np.int64, len(saved))
        more = np.zeros(len(self.sizes) + 1, np.int64)
        np.add.at(more, self.last_forward[kept] + 1, np.array(sizes, np.int64)[kept])
        return self.joint.forward_bytes + np.cumsum(more[:-1])


def everything(joint: Joint) -> frozenset[int]:
    """All nodes that the backward part reads, and those that cannot be computed again."""
    return frozenset(joint.whole.reads) | pinned(joint)


def pinned(joint: Joint) -> frozenset[int]:
    """The nodes that are computed only once."""
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
        self.simulate.known.clear()
        self.simulate.chains.clear()
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
                members = [k for k in self.kinds[kind] if k not in getattr(choice, what)]
                if members:
                    kept = self._kept(what, choice, members, budget)
                    there = self.simulate(kept, budget)
                    if there.peak <= budget and there.seconds < here.seconds:
                        choice, here = kept, there
        return choice
