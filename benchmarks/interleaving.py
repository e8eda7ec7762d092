"""Interleaved timing: several variants of a computation take turns in one process.

Each turn gives a ratio, and the result is the median of the ratios. So other work on the machine slows all variants
alike. CPU seconds are those of all threads of this process. They exclude the time in which other processes use the
core, so they vary less. Wall seconds are the time that a user waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Took:
    """Seconds per call, float[ways, rounds]."""

    wall_s: np.ndarray
    cpu_s: np.ndarray


@dataclass(frozen=True)
class Figure:
    """A number with a target: it must lie between `least` and `most`."""

    name: str
    value: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def is_met(self) -> bool:
        return self.least <= self.value <= self.most

    @property
    def target(self) -> str:
        if self.least == self.most:
            return f"{self.least:g}"
        bounds = [f"≥ {self.least:g}"] * math.isfinite(self.least) + [f"≤ {self.most:g}"] * math.isfinite(self.most)
        return ", ".join(bounds)


def interleaved(
    *ways: Callable[[], Any],
    rounds: int,
    calls: int = 1,
    before: Callable[[], Any] = lambda: None,
    within_s: float = math.inf,
    least: int = 3,
) -> Took:
    """Time each variant once per round. The order of the variants alternates between rounds.

    Args:
      calls: number of calls of a variant in its turn.
      before: called before each turn; its time does not count.
      within_s: time limit in seconds. After `least` rounds, no new round starts beyond the limit.
    """
    started_s, rounds_s = time.perf_counter(), []
    while len(rounds_s) < rounds and (len(rounds_s) < least or time.perf_counter() - started_s < within_s):
        turns = {}
        for k in range(len(ways))[:: 1 if len(rounds_s) % 2 else -1]:
            way = ways[k]
            before()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            for _ in range(calls):
                way()
            turns[k] = time.perf_counter() - wall_s, time.process_time() - cpu_s
        rounds_s.append([turns[k] for k in range(len(ways))])
    return Took(*np.array(rounds_s).T / calls)


def calls_within(seconds: float, way: Callable[[], Any]) -> int:
    """The number of calls that take about `seconds`, at least 1."""
    way()  # compiles
    once_s = interleaved(way, rounds=3, within_s=seconds, least=1).wall_s.min()
    return max(1, int(seconds / once_s))


def ratio(ours_s: np.ndarray, theirs_s: np.ndarray) -> float:
    """The median of the ratios over the rounds."""
    return float(np.median(ours_s / theirs_s))


def geomean(ratios: Iterable[float]) -> float:
    return math.exp(np.mean([math.log(r) for r in ratios]))
