"""`Policy`: which values a gradient saves. `Simulation`: its peak memory and seconds, before anything is compiled.

Source: Checkmate (Jain et al. 2020, arXiv:1910.02653), section 4, with the stages of the backward part as time steps. Symbols:

    S  nodes in memory before a stage: the saved ones, and retained ones that an earlier stage recomputed (`available`)
    R  nodes that a stage recomputes: the ancestors, outside of S, of the nodes that it reads (`Recomputation`)
    U  bytes in memory at each equation; its maximum is the peak

Checkmate chooses S and R freely. Here both follow from a `Policy`: one saved set and one retained set for all stages. Sets of
nodes are bits of integers, because a search simulates hundreds of policies with hundreds of such sets each.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .joint import Joint, Stage


class Policy(NamedTuple):
    """A rematerialisation policy.

    Attributes:
      saved: nodes that the forward part keeps for the backward part.
      retained: recomputed nodes that stay in memory until the last stage that reads them; None for all.
      is_staged: whether each stage recomputes what it reads. If not, all of it is recomputed at once.
    """

    saved: frozenset[int]
    retained: frozenset[int] | None = None
    is_staged: bool = True

    def stages(self, joint: Joint) -> Sequence[Stage]:
        """The stages of the backward part."""
        return joint.stages if self.is_staged else [joint.whole]


class Outcome(NamedTuple):
    """The simulated costs of a policy.

    Attributes:
      peak: in bytes.
      seconds: of recomputation and allocation by the device model; in the body of a loop, the transfers between stages take
        the place of the allocation.
      excess: bytes above the budget, summed over all equations.
    """

    peak: int
    seconds: float
    excess: float


class Recomputation(NamedTuple):
    """The recomputation of one stage.

    Attributes:
      nodes, sources: the recomputed nodes (R), and the available nodes that they read; as bits.
      order, source_ids: the same as arrays of indices.
      intermediates: recomputed nodes that the stage itself does not read.
      targets, ends: recomputed nodes that the stage reads, and the places after their last read in the stage.
      seconds: of all recomputed nodes.
      transients: by the set of intermediates that die in the stage, the bytes that are alive only during the recomputation.
    """

    nodes: int
    sources: int
    order: np.ndarray
    source_ids: np.ndarray
    intermediates: np.ndarray
    targets: np.ndarray
    ends: np.ndarray
    seconds: float
    transients: dict[bytes, int]


class Simulation:
    """The memory and time of policies, if equations run in program order.

    Args:
      joint: the program.
      is_allocating: whether the program allocates its memory, unlike the body of a loop.
    """

    def __init__(self, joint: Joint, *, is_allocating: bool):
        self.joint, self.device, self.is_allocating = joint, joint.device, is_allocating
        self.sizes = np.array([node.bytes for node in joint.nodes], np.int64)
        self.seconds = np.array([node.seconds for node in joint.nodes], float)
        self.sources = [_bits(node.sources) for node in joint.nodes]
        self.is_run = np.array([node.is_run for node in joint.nodes], bool)
        self.last_forward = np.array(joint.last_forward, np.int64)
        self.stages = {is_staged: self._stages(is_staged) for is_staged in (False, True)}
        self.outcomes: dict[tuple[Policy, float], Outcome] = {}
        self.recomputations: dict[tuple[int, int, int], list[Recomputation]] = defaultdict(list)

    def __call__(self, policy: Policy, budget: float) -> Outcome:
        """The outcome of a policy."""
        if (policy, budget) not in self.outcomes:
            self.outcomes[policy, budget] = self._outcome(policy, budget)
        return self.outcomes[policy, budget]

    def forget(self) -> None:
        """Drop all memoised outcomes and recomputations."""
        self.outcomes.clear()
        self.recomputations.clear()

    def _stages(self, is_staged: bool) -> tuple[list[tuple[Stage, int]], np.ndarray]:
        """The stages, each with the nodes that it reads as bits; and the place of the last read of each node, or -1."""
        stages, last_read = Policy(frozenset(), None, is_staged).stages(self.joint), np.full(len(self.sizes), -1)
        for stage in stages:
            last_read[[*stage.reads]] = [*stage.reads.values()]
        return [(stage, _bits(stage.reads)) for stage in stages], last_read

    def _outcome(self, policy: Policy, budget: float) -> Outcome:
        saved, sizes = _indices(policy.saved), self.sizes_with(policy.saved)
        is_retained = np.full(len(sizes), policy.retained is None)
        is_retained[_indices(policy.retained or frozenset())] = True
        # The first and the last place in the backward part where each node is in memory; -1 for none.
        first, last = np.full(len(sizes), -1), np.full(len(sizes), -1)
        first[saved] = 0
        available, retained = _packed(first == 0), _packed(is_retained)
        runs: list[tuple[Stage, Recomputation]] = []
        stages, last_read = self.stages[policy.is_staged]
        for stage, reads in stages:  # invariant: `available` is S of the stage
            if missing := reads & ~available:
                recomputation = self._recomputation(stage, missing, available)
                available |= recomputation.nodes & retained
                runs.append((stage, recomputation))
        parts = [r for _, r in runs]
        starts, stops = [s.start for s, _ in runs], [s.stop for s, _ in runs]
        order, at = _joined([r.order for r in parts], starts)
        is_first_run = np.zeros(len(sizes), bool)
        is_first_run[order] = ~self.is_run[order]
        kept = order[is_retained[order]]
        first[kept] = last[kept] = at[is_retained[order]]
        sources, at = _joined([r.source_ids for r in parts], starts)
        last[sources] = at  # of several places, the last one is assigned last
        last = np.maximum(last, last_read)
        crossing = 0
        if self.device.is_fusing and not self.is_allocating:
            order, after = _joined([r.order for r in parts], stops)
            crossing = int(sizes[order[(first[order] >= 0) & (last[order] >= after)]].sum())
        intermediates, at = _joined([r.intermediates for r in parts], starts)
        is_dying = (first[intermediates] < 0) | (last[intermediates] == at)
        first[intermediates[is_dying]] = -1
        change = np.zeros(len(self.joint.backward_bytes) + 1, np.int64)  # of U, from each equation to the next
        alive = np.flatnonzero((first >= 0) & (last >= 0))
        _add(change, first[alive], last[alive] + 1, sizes[alive])
        targets, at = _joined([r.targets for r in parts], starts)
        ends, _ = _joined([r.ends for r in parts], starts)
        is_local = ~is_retained[targets]
        _add(change, at[is_local], ends[is_local], sizes[targets[is_local]])
        profile = self.joint.backward_bytes + np.cumsum(change[:-1])
        flags, k = is_dying.tobytes(), 0
        for stage, recomputation in runs:
            dying, k = flags[k : k + len(recomputation.intermediates)], k + len(recomputation.intermediates)
            if any(dying):
                profile[stage.start] += self._transient_bytes(recomputation, dying)
        forward = self._forward_bytes(saved, sizes)
        peak = int(max(profile.max(initial=0), forward.max(initial=0)))
        excess = np.maximum(profile - budget, 0).sum() + np.maximum(forward - budget, 0).sum()
        seconds = sum(r.seconds for r in parts) - float(self.seconds[is_first_run].sum())
        seconds += self.device.allocation_s(peak) if self.is_allocating else self.device.transfer_s(crossing, crossing)
        return Outcome(peak, seconds, float(excess))

    def _recomputation(self, stage: Stage, missing: int, available: int) -> Recomputation:
        """The recomputation of a stage for the nodes that it reads and misses; mostly memoised from the policy before."""
        memo = self.recomputations[stage.start, stage.stop, missing]
        for recomputation in memo:
            if not recomputation.sources & ~available and not recomputation.nodes & available:
                return recomputation
        nodes, sources, pending = missing, 0, missing
        order: list[int] = []
        while (
            pending
        ):  # invariant: every reader of a node in `nodes` that is itself recomputed is handled before the node
            k = pending.bit_length() - 1
            order.append(k)
            sources |= self.sources[k] & available
            new = self.sources[k] & ~(available | nodes)
            nodes, pending = nodes | new, (pending ^ 1 << k) | new
        order.reverse()
        targets = _members(missing)
        memo.append(
            Recomputation(
                nodes,
                sources,
                _indices(order),
                _indices(_members(sources)),
                _indices([k for k in order if k not in stage.reads]),
                _indices(targets),
                _indices([stage.reads[k] + 1 for k in targets]),
                float(self.seconds[order].sum()),
                {},
            )
        )
        return memo[-1]

    def _transient_bytes(self, recomputation: Recomputation, dying: bytes) -> int:
        """The bytes alive during a recomputation beyond those alive after it; `dying` flags its intermediates that die in it."""
        if dying not in recomputation.transients:
            nodes, order, freed = self.joint.nodes, recomputation.order.tolist(), defaultdict[int, int](int)
            last = {s: k for k in order for s in nodes[k].sources}
            for k in itertools.compress(recomputation.intermediates.tolist(), dying):
                freed[last[k]] += nodes[k].bytes
            live = most = 0
            for k in order:
                live += nodes[k].bytes
                most = max(most, live)
                live -= freed.get(k, 0)
            recomputation.transients[dying] = most - live
        return recomputation.transients[dying]

    def sizes_with(self, saved: frozenset[int]) -> np.ndarray:
        """The bytes of each node. A saved node counts only the results that something reads later."""
        partial = saved & self.joint.results.keys()
        sizes = self.sizes.copy() if partial else self.sizes
        for k in partial:
            sizes[k] = sum(r.bytes for r in self.joint.results[k] if r.is_read_back or not r.readers <= saved)
        return sizes

    def _forward_bytes(self, saved: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The live bytes at each node of the forward part."""
        change = np.zeros(len(sizes) + 1, np.int64)
        np.add.at(change, self.last_forward[saved] + 1, sizes[saved])
        return self.joint.forward_bytes + np.cumsum(change[:-1])


def _add(change: np.ndarray, start: np.ndarray, stop: np.ndarray, sizes: np.ndarray) -> None:
    """Add values of such sizes, alive from `start` to before `stop`, to the change at each equation."""
    np.add.at(change, start, sizes)
    np.subtract.at(change, stop, sizes)


def _joined(arrays: Sequence[np.ndarray], values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The elements of all arrays, and for each the value of its array."""
    joined = np.concatenate([np.zeros(0, np.int64), *arrays])
    return joined, np.repeat(np.array(values, np.int64), [*map(len, arrays)])


def _indices(nodes: Collection[int]) -> np.ndarray:
    return np.fromiter(nodes, np.int64, len(nodes))


def _bits(nodes: Iterable[int]) -> int:
    """Distinct nodes as bits of an integer."""
    return sum(1 << k for k in nodes)


def _packed(flags: np.ndarray) -> int:
    """Flags as bits of an integer."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _members(bits: int) -> list[int]:
    """The nodes whose bits are set, in ascending order."""
    members = []
    while bits:
        low = bits & -bits
        members.append(low.bit_length() - 1)
        bits ^= low
    return members
