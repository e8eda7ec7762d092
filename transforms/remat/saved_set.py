"""`Search`: the cheapest policy within a budget, by local search on the simulated peak.

Minimise the seconds of recomputation, subject to a peak within the budget. Minimising saved bytes instead (a minimum cut) is not
monotone in the peak, and integer programming as in Checkmate (Jain et al. 2020, arXiv:1910.02653) takes too long for a compiler
pass. The search starts from two ends: the policy that saves everything, and policies that save only the values between k
segments, as Chen et al. 2016 (arXiv:1604.06174, section 4) do for k = √n. From each it

1. drops nodes of one kind together, by the best ratio of bytes above the budget to seconds, until the peak fits (`reduced`):
   first saved nodes, then retained ones; every step lowers the excess above the budget;
2. drops what takes longer to allocate than to recompute (`leaner`);
3. adds kinds again while they fit, by seconds per byte (`refilled`): every step lowers the seconds within the budget;
4. exchanges single nodes (`polished`).

One path from the policy that saves everything to the one that saves least, for all budgets, is simpler and worse: it drops early
what a smaller budget needs, and has no evenly spaced segments. Within 35 %, its recomputation and allocation for a transformer of
6 layers take 47 to 54 % of the seconds of a forward pass, those of the search 36 %. Below 20 %, it finds nothing for the MLP.

The constants are compared on the MLP, transformers (6 and 9 layers), ResNet and U-Net of benchmarks/budgets.py within 50, 35, 25
and 15 %, by the simulated seconds: as a ratio to those with the constant, the geometric mean and the worst of 17 searches.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .joint import Joint, live_bytes
from .policy import Outcome, Policy, Simulation

MIN_SECONDS = 1e-9  # keeps ratios of bytes to seconds finite

# Parts of a segment, between which values may be retained. With 2: 1.006, worst 1.10; with 8: 1.011, worst 1.21.
PARTS = 4
# Starts of each kind. With 1: 1.035, worst 1.86; with 4: 0.996, and 1.7 times the CPU time.
STARTS = 2
# A saved node is dropped below this part of the worth of the best node that is not saved. With 0.1: 1.004, worst 1.11; with 0.6:
# 1.001, worst 1.03.
MIN_WORTH = 0.3
# The effort of a search is this divided by its equations: it limits the starts and the polishing of large programs. With 12,000:
# a transformer of 4,544 equations within 50 and 15 % takes 1.000 and 0.959, and twice the CPU time.
EQUATIONS = 3000
# With less effort, the first policy that fits is taken. With 0: a transformer of 9,944 equations within 50 and 15 % takes 1.000
# and 0.888, and 5 times the CPU time.
MIN_EFFORT = 0.5


def everything(joint: Joint) -> frozenset[int]:
    """All nodes that the backward part reads, and all pinned ones."""
    return frozenset(joint.whole.reads) | pinned(joint)


def pinned(joint: Joint) -> frozenset[int]:
    """The nodes that are never recomputed."""
    return frozenset(k for k, node in enumerate(joint.nodes) if node.is_pinned)


def segments(joint: Joint, count: int) -> frozenset[int]:
    """The nodes alive between `count` segments of the forward part, of about equal bytes, cut where few bytes are alive."""
    nodes, last = joint.nodes, joint.last_forward
    if not nodes:
        return frozenset()
    values = ((k, last[k], node.bytes) for k, node in enumerate(nodes) if node.is_run and last[k] > k)
    crossing = live_bytes(values, len(nodes))  # after each node
    work = np.cumsum([node.bytes for node in nodes], dtype=float)
    is_run, last_read = np.array([node.is_run for node in nodes], bool), np.array(last)
    saved = set(pinned(joint))
    for k in range(1, count):
        target, reach = work[-1] * k / count, work[-1] / count / 2
        near = np.flatnonzero((abs(work - target) <= reach) & (crossing != 0))
        if len(near):
            least = near[crossing[near] == np.min(crossing[near])]
            cut = least[abs(work[least] - target).argmin()]
            saved.update(np.flatnonzero(is_run[: cut + 1] & (last_read[: cut + 1] > cut)).tolist())
    return frozenset(saved)


class Search:
    """Policies for one program, within any budget."""

    def __init__(self, joint: Joint):
        self.joint, self.simulate = joint, Simulation(joint, is_allocating=True)
        self.kinds: dict[object, list[int]] = defaultdict(list)
        for k, node in enumerate(joint.nodes):
            if not node.is_pinned:
                self.kinds[node.kind].append(k)
        self.pinned = pinned(joint)
        self.effort = EQUATIONS / (len(joint.eqns) + 1)  # a simulation takes time in proportion to the equations

    @cached_property
    def starts(self) -> list[Policy]:
        """The policy that saves everything, and the policies of the lowest peaks among those that save only between segments.

        Of a recomputed segment, they retain all, the values between its parts, or nothing: `STARTS` of each.
        """
        counts = sorted({round(2 ** (k / 2)) for k in range(2, 12)})
        between = {
            segments(self.joint, n): segments(self.joint, PARTS * n) for n in counts if n <= len(self.joint.stages)
        }
        retaining = (
            [Policy(saved) for saved in between],
            [Policy(saved, parts) for saved, parts in between.items()],
            [Policy(saved, frozenset()) for saved in between],
        )
        peak = lambda policy: self.simulate(policy, 0).peak
        count = max(min(STARTS, int(self.effort)), 1)
        lowest = (policy for policies in retaining for policy in sorted(policies, key=peak)[:count])
        return [Policy(everything(self.joint)), *lowest]

    @cached_property
    def lowest(self) -> int:
        """The lowest peak of a start."""
        return min(self.simulate(start, 0).peak for start in self.starts)

    def best(self, budget: float) -> tuple[Policy, Outcome] | None:
        """The cheapest policy found within a budget; None if none fits."""
        fitting: list[tuple[float, int, Policy]] = []
        for start in self.starts:
            policy = self.refilled(self.leaner(self.reduced(start, budget), budget), budget)
            outcome = self.simulate(policy, budget)
            if outcome.peak <= budget:
                fitting.append((outcome.seconds, len(fitting), policy))
            if fitting and self.effort < MIN_EFFORT:
                break
        cheapest = [policy for _, _, policy in sorted(fitting)]
        candidates = cheapest[:1]
        if self.effort >= 2:  # polishing lowers the seconds most where all is retained
            candidates += [p for p in cheapest[1:] if p.retained is None]
        best = min((self.polished(p, budget) for p in candidates), key=lambda pair: pair[1].seconds, default=None)
        free = self.joint.device.mmap_bytes - 1
        if best and best[1].peak <= free < budget:  # allocation stays free up to there: save what fits
            best = self.polished(self.refilled(best[0], free), free)
        self.simulate.forget()
        return best

    def polished(self, policy: Policy, budget: float) -> tuple[Policy, Outcome]:
        """Exchange single nodes until the seconds settle. Invariant: the peak fits, and the seconds fall."""
        is_settled = self.effort < 1
        while not is_settled:
            polished = self._cheaper(policy, self._exchanged(policy, budget), budget)
            is_settled, policy = polished is policy, polished
        return policy, self.simulate(policy, budget)

    def _exchanged(self, policy: Policy, budget: float) -> Policy:
        """Drop single nodes of little worth, then save the single nodes of the most worth that fit."""
        nodes = self.joint.nodes
        worth = lambda k: nodes[k].seconds / (nodes[k].bytes + 1)
        unsaved = sorted((k for k in range(len(nodes)) if k not in policy.saved and nodes[k].is_run), key=worth)
        largest = max((nodes[k].bytes for k in unsaved), default=0)
        best_worth = max((worth(k) for k in unsaved if nodes[k].bytes >= largest / 100), default=0.0)
        for k in sorted(policy.saved - self.pinned, key=worth):
            smaller = policy._replace(saved=policy.saved - {k})
            extra_s = self.simulate(smaller, budget).seconds - self.simulate(policy, budget).seconds
            policy = smaller if extra_s / (nodes[k].bytes + 1) < MIN_WORTH * best_worth else policy
        for k in reversed(unsaved):
            policy = self._cheaper(policy, policy._replace(saved=policy.saved | {k}), budget)
        return policy

    def reduced(self, policy: Policy, budget: float) -> Policy:
        """Save less, then retain less, until the peak fits or nothing lowers it."""
        policy = self._dropped("saved", policy, budget)
        if self.simulate(policy, budget).excess > 0:
            retained = frozenset(range(len(self.joint.nodes))) if policy.retained is None else policy.retained
            policy = self._dropped("retained", policy._replace(retained=retained - policy.saved), budget)
        return policy

    def _dropped(self, field: str, policy: Policy, budget: float) -> Policy:
        """Drop kinds from a field of the policy, the best ratio first. Invariant: each step lowers the excess."""
        outcome = self.simulate(policy, budget)
        scores = dict.fromkeys(self.kinds, math.inf)
        while outcome.excess > 0:
            best = None
            # Lazy greedy (Minoux 1978): the score of a kind nearly always falls as others are dropped, so an old score bounds it.
            for kind in sorted(scores, key=lambda k: -scores[k]):
                if best and scores[kind] <= scores[best[0]]:
                    break
                members = [k for k in self.kinds[kind] if k in getattr(policy, field)]
                if not members:
                    scores[kind] = -math.inf
                    continue
                smaller = policy._replace(**{field: getattr(policy, field).difference(members)})
                smaller_outcome = self.simulate(smaller, budget)
                extra_s = max(smaller_outcome.seconds - outcome.seconds, 0.0)
                scores[kind] = (outcome.excess - smaller_outcome.excess) / (extra_s + MIN_SECONDS)
                if smaller_outcome.excess < outcome.excess and (best is None or scores[kind] > scores[best[0]]):
                    best = kind, members, smaller, smaller_outcome
            if best is None:
                break
            _, members, policy, outcome = best
            if outcome.excess == 0:
                return self._extended(field, policy, members, budget)
        return policy

    def leaner(self, policy: Policy, budget: float) -> Policy:
        """Drop saved kinds that take longer to allocate than to recompute. Invariant: seconds fall, the excess does not rise.

        Without it, transformers of 2,069 and 9,944 equations within 75 % take 13 and 16 % more seconds; smaller budgets the same.
        """
        for kind in sorted(self.kinds, key=self._worth):
            smaller = policy._replace(saved=policy.saved.difference(self.kinds[kind]))
            old, new = self.simulate(policy, budget), self.simulate(smaller, budget)
            policy = smaller if new.seconds < old.seconds and new.excess <= old.excess else policy
        return policy

    def _worth(self, kind: object) -> float:
        """The seconds per byte of a node of a kind."""
        node = self.joint.nodes[self.kinds[kind][0]]
        return node.seconds / (node.bytes + 1)

    def _extended(self, field: str, policy: Policy, members: Sequence[int], budget: float) -> Policy:
        """Add the last of `members` to a field, as many as fit: late nodes are recomputed while little else is alive."""
        extended = lambda n: policy._replace(**{field: getattr(policy, field).union(members[len(members) - n :])})
        is_excessive = lambda n: self.simulate(extended(n), budget).excess > 0
        if not is_excessive(len(members)):
            return extended(len(members))
        return extended(bisect_left(range(1, len(members)), True, key=is_excessive))

    def refilled(self, policy: Policy, budget: float) -> Policy:
        """Save and retain kinds that fit, the most seconds per byte first. Invariant: the peak fits, and the seconds fall."""
        for field in ("saved", "retained"):
            for kind in sorted(self.kinds, key=self._worth, reverse=True) if getattr(policy, field) is not None else ():
                members = [k for k in self.kinds[kind] if k not in policy.saved and k not in getattr(policy, field)]
                if members:
                    policy = self._cheaper(policy, self._extended(field, policy, members, budget), budget)
        return policy

    def _cheaper(self, policy: Policy, other: Policy, budget: float) -> Policy:
        """`other` if it fits and is faster, else the policy."""
        outcome = self.simulate(other, budget)
        return other if outcome.peak <= budget and outcome.seconds < self.simulate(policy, budget).seconds else policy
