"""The memory and time that a choice of what is kept comes to, before anything is compiled.

A simulation runs the two parts of a gradient as `emission` lays them out. Sets of nodes are bits of integers here: a search
takes hundreds of simulations, of hundreds of such sets each.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .joint import Joint, Stage

EMPTY = np.zeros(0, np.int64)


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


class Layout(NamedTuple):
    """The stages of the backward part, the nodes that each reads, and the last place where each node is read, or -1."""

    stages: Sequence[Stage]
    reads: list[int]
    last: np.ndarray


class Chain(NamedTuple):
    """What a stage computes again.

    Attributes:
      nodes, sources: these, and those that are there already and that these read.
      made, read: the same, as indices.
      unread: of the nodes, those that only others of them may read.
      missing, until: those that the stage reads, and the places after it does.
      seconds: to compute all of them.
      bumps: by what is read in it alone, how much more is alive while it is computed than after it.
    """

    nodes: int
    sources: int
    made: np.ndarray
    read: np.ndarray
    unread: np.ndarray
    missing: np.ndarray
    until: np.ndarray
    seconds: float
    bumps: dict[bytes, int]


class Simulation:
    """The memory and time of choices, as they would be if equations ran in their order.

    Args:
      joint: the program.
      is_new: whether it takes its memory anew, unlike the body of a loop. There, what stages hand on may count.
    """

    def __init__(self, joint: Joint, *, is_new: bool):
        self.joint, self.machine, self.is_new = joint, joint.machine, is_new
        self.sizes = np.array([node.bytes for node in joint.nodes], np.int64)
        self.seconds = np.array([node.seconds for node in joint.nodes], float)
        self.sources = [_bits(node.sources) for node in joint.nodes]
        self.is_run = np.array([node.is_run for node in joint.nodes], bool)
        self.last_forward = np.array(joint.last_forward, np.int64)
        self.layouts: dict[bool, Layout] = {}
        self.known: dict[tuple[Choice, float], Outcome] = {}
        self.chains: dict[tuple[int, int, int], list[Chain]] = defaultdict(list)

    def __call__(self, choice: Choice, budget: float) -> Outcome:
        """The outcome of a choice."""
        if (choice, budget) not in self.known:
            self.known[choice, budget] = self._outcome(choice, budget)
        return self.known[choice, budget]

    def _outcome(self, choice: Choice, budget: float) -> Outcome:
        stages, reads, last_read = self._layout(choice)
        saved, sizes = _indices(choice.saved), self.sizes_with(choice.saved)
        is_held = np.full(len(sizes), choice.held is None)
        is_held[_indices(choice.held or frozenset())] = True
        # Where each node comes to be there, and where it is read last.
        born, last = np.full(len(sizes), -1), np.full(len(sizes), -1)
        born[saved] = 0
        there, held = _packed(born == 0), _packed(is_held)
        chains: list[Chain] = []
        starts: list[int] = []
        stops: list[int] = []
        for stage, wanted in zip(stages, reads, strict=True):
            if missing := wanted & ~there:
                chain = self._chain(stage, missing, there)
                there |= chain.nodes & held
                chains.append(chain)
                starts.append(stage.start)
                stops.append(stage.stop)
        made, at = _together([chain.made for chain in chains], starts)
        is_first = np.zeros(len(sizes), bool)  # what nothing has computed before
        is_first[made] = ~self.is_run[made]
        kept = made[is_held[made]]
        born[kept] = last[kept] = at[is_held[made]]
        read, at = _together([chain.read for chain in chains], starts)
        last[read] = at  # of several places the last
        last = np.maximum(last, last_read)
        crossing = 0
        if self.machine.is_fusing and not self.is_new:
            made, after = _together([chain.made for chain in chains], stops)
            crossing = int(sizes[made[(born[made] >= 0) & (last[made] >= after)]].sum())
        unread, at = _together([chain.unread for chain in chains], starts)
        is_passing = (born[unread] < 0) | (last[unread] == at)
        born[unread[is_passing]] = -1
        change = np.zeros(len(self.joint.backward_bytes) + 1, np.int64)
        alive = np.flatnonzero((born >= 0) & (last >= 0))
        _add(change, born[alive], last[alive] + 1, sizes[alive])
        if choice.held is not None:
            missed, at = _together([chain.missing for chain in chains], starts)
            until, _ = _together([chain.until for chain in chains], starts)
            is_lost = ~is_held[missed]
            _add(change, at[is_lost], until[is_lost], sizes[missed[is_lost]])
        profile = self.joint.backward_bytes + np.cumsum(change[:-1])
        flags, k = is_passing.tobytes(), 0
        for chain, start in zip(chains, starts, strict=True):
            passing, k = flags[k : k + len(chain.unread)], k + len(chain.unread)
            if any(passing):
                profile[start] += self._bump(chain, passing)
        before = self._forward(saved, sizes)
        peak = int(max(profile.max(initial=0), before.max(initial=0)))
        excess = np.maximum(profile - budget, 0).sum() + np.maximum(before - budget, 0).sum()
        seconds = sum(chain.seconds for chain in chains) - float(self.seconds[is_first].sum())
        seconds += self.machine.taken(peak) if self.is_new else self.machine.moved(crossing, crossing)
        return Outcome(peak, seconds, float(excess))

    def _layout(self, choice: Choice) -> Layout:
        """How the backward part is cut."""
        if choice.is_staged not in self.layouts:
            stages, last = choice.stages(self.joint), np.full(len(self.sizes), -1)
            for stage in stages:
                last[[*stage.reads]] = [*stage.reads.values()]
            self.layouts[choice.is_staged] = Layout(stages, [_bits(stage.reads) for stage in stages], last)
        return self.layouts[choice.is_staged]

    def _chain(self, stage: Stage, missing: int, there: int) -> Chain:
        """What a stage must compute for what it misses; mostly what it did in the choice before."""
        key = stage.start, stage.stop, missing
        for chain in self.chains[key]:
            if not chain.sources & ~there and not chain.nodes & there:
                return chain
        found, sources, todo = missing, 0, missing
        order: list[int] = []
        while todo:  # from the last on: what reads a node comes after it
            k = todo.bit_length() - 1
            order.append(k)
            sources |= self.sources[k] & there
            new = self.sources[k] & ~(there | found)
            found, todo = found | new, (todo ^ 1 << k) | new
        order.reverse()
        made, read, wanted = _indices(order), _indices(_nodes(sources)), _indices(_nodes(missing))
        unread = _indices([k for k in order if k not in stage.reads])
        until = _indices([stage.reads[k] + 1 for k in _nodes(missing)])
        seconds = float(self.seconds[order].sum())
        chain = Chain(found, sources, made, read, unread, wanted, until, seconds, {})
        self.chains[key].append(chain)
        return chain

    def _bump(self, chain: Chain, passing: bytes) -> int:
        """By how much more is alive while a chain is computed than after it; what is passing is read in it alone."""
        if passing not in chain.bumps:
            nodes, made, freed = self.joint.nodes, chain.made.tolist(), defaultdict[int, int](int)
            last = {s: k for k in made for s in nodes[k].sources}
            for k in itertools.compress(chain.unread.tolist(), passing):
                freed[last[k]] += nodes[k].bytes
            live = most = 0
            for k in made:
                live += nodes[k].bytes
                most = max(most, live)
                live -= freed.get(k, 0)
            chain.bumps[passing] = most - live
        return chain.bumps[passing]

    def sizes_with(self, saved: frozenset[int]) -> np.ndarray:
        """The bytes of each node; of the results of what is saved only those that something reads later."""
        some = saved & self.joint.results.keys()
        sizes = self.sizes.copy() if some else self.sizes
        for k in some:
            sizes[k] = sum(r.bytes for r in self.joint.results[k] if r.is_read_back or not r.readers <= saved)
        return sizes

    def _forward(self, saved: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """What is alive at each node of the forward part."""
        more = np.zeros(len(sizes) + 1, np.int64)
        np.add.at(more, self.last_forward[saved] + 1, sizes[saved])
        return self.joint.forward_bytes + np.cumsum(more[:-1])


def _add(change: np.ndarray, start: np.ndarray, stop: np.ndarray, sizes: np.ndarray) -> None:
    """Add what is alive from `start` on to before `stop` to the changes at each equation."""
    np.add.at(change, start, sizes)
    np.subtract.at(change, stop, sizes)


def _together(parts: Sequence[np.ndarray], values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The elements of all parts, and for each the value of its part."""
    if not parts:
        return EMPTY, EMPTY
    return np.concatenate(parts), np.repeat(np.array(values), [*map(len, parts)])


def _indices(nodes: Collection[int]) -> np.ndarray:
    return np.fromiter(nodes, np.int64, len(nodes))


def _bits(nodes: Iterable[int]) -> int:
    """Nodes as bits of a number."""
    return functools.reduce(lambda bits, k: bits | 1 << k, nodes, 0)


def _packed(flags: np.ndarray) -> int:
    """Flags as bits of a number."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _nodes(bits: int) -> list[int]:
    """The nodes that the bits of a number are, from the first on."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
