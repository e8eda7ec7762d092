"""The steps at which a loop of unknown length is checkpointed, and how its steps are reversed from the checkpoints.

A loop of n steps is cut into units of u = `residual_steps` steps; the last unit is short. Checkpoints lie at the starts of units
in s = `checkpoints` slots; the first unit starts at the loop's own input, which takes no slot. Symbols, as in revolve:

    r         repetitions: how often a step runs again before it is reversed
    β(s, r)   binomial(s + r, s), the longest chain of units that s slots, that of its first unit among them, reverse with r
              repetitions

- **Forward.** A new checkpoint that finds all slots full takes the place of another: two neighbouring segments are merged, those
  whose merged segment can be reversed with the smallest r, the earliest of these. A merged segment before k later checkpoints has
  k + 1 slots when its turn comes, so it needs the smallest r with β(k + 1, r) ≥ its units. After a merge with r repetitions only
  one unit in r is stored, as the last segments of the optimal schedule are about so long.
- **Backward.** Segments are reversed from the last to the first, each by the binomial schedule with the slots that are free.

Up to β(s, 2) = (s + 1)(s + 2) / 2 units no step runs more than twice after the loop itself; for longer loops the number of steps
stays within some percent of the optimum for a length that is known before (`evaluations`).

Source: Griewank & Walther 2000, Algorithm 799: revolve, doi:10.1145/347837.347846 (β, and the backward schedule). Wang, Moin &
Iaccarino 2009, Minimal repetition dynamic checkpointing, doi:10.1137/080727890 (unknown length; the criterion r, here minimised
over the pairs of segments instead of by levels). Stumm & Walther 2010, New algorithms for optimal online checkpointing,
doi:10.1137/080742439 (unknown length, and how close to the optimal number of steps a schedule can come).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..core.errors import OptionError

_MAX_CHECKPOINTS = 10_000


@dataclass(frozen=True)
class Loops:
    """How much memory the gradient of a `while` loop may use: `checkpoints` states and the residuals of `residual_steps` steps.

    Attributes:
      checkpoints: how many states of the loop are kept, besides the one that it starts from; from 1 to 10,000. Less than about 4
        save little memory and cost much time.
      residual_steps: for how many consecutive steps the residuals of the gradient are kept; at least 1. A loop of no more steps
        computes nothing twice, so this is what to raise to keep everything. With 1 no residuals are kept at all.
    """

    checkpoints: int = 32
    residual_steps: int = 16

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise OptionError(f"Loops takes {name} as an integer of at least 1, and got {value!r}.")
            object.__setattr__(self, name, int(value))
        if self.checkpoints > _MAX_CHECKPOINTS:
            hint = "residual_steps as large as the longest loop keeps everything"
            raise OptionError(
                f"Loops takes at most {_MAX_CHECKPOINTS:,} checkpoints, and got {self.checkpoints:,}.", hint=hint
            )


@functools.cache
def lengths(slots: int) -> np.ndarray:
    """`lengths(slots)[r, s]` is β(s, r), for 0 <= s <= slots + 1."""
    row, rows = np.ones(slots + 2, np.int64), []
    for _ in range(64 if slots > 3 else 1024):  # invariant: row[s] = β(s, r), the sum of β(·, r - 1) up to s
        rows.append(row)
        row = np.minimum(np.cumsum(row), 2**30)
    return np.array(rows, np.int32)


def merge(ends: Any, unit: Any) -> tuple[Any, Any]:
    """The rank of the checkpoint that gives its slot to another, and the repetitions r that its merged segment needs.

    Args:
      ends: int32 [s], the units of the checkpoints, ascending, with all slots full. unit: int32 scalar, the later unit to store.
    """
    slots = ends.shape[0]
    merged = jnp.append(ends[1:], unit) - jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    repetitions = jnp.sum(lengths(slots)[:, slots + 1 : 1 : -1] < merged[None], axis=0, dtype=ends.dtype)
    rank = jnp.argmin(repetitions).astype(ends.dtype)
    return rank, repetitions[rank]


def advance(units: Any, free: Any, slots: int) -> Any:
    """How far into a segment of at least 2 units its next checkpoint lies, with 1 to `slots` free slots; all if there is none."""
    reach = jnp.asarray(lengths(slots))[:, free + 1]
    repetitions = jnp.argmax(reach >= units)
    return jnp.where(free > 0, jnp.clip(reach[repetitions - 1], 1, units - 1), units - 1)


def evaluations(steps: int, loops: Loops) -> int:
    """How often the body runs for the gradient of a loop of so many steps, the loop itself included."""
    u, slots = loops.residual_steps, loops.checkpoints
    if 1 < u >= steps:
        return steps
    beta = lengths(slots)
    repetitions = lambda units, s: int(np.sum(beta[:, s] < units))

    def advances(units, free):
        """The units that run again to reverse a segment."""
        total = 0
        while units > 1:  # invariant: the segment's first `units` units are still to be reversed, with `free` slots
            if not free:
                return total + units * (units - 1) // 2
            first = min(max(int(beta[repetitions(units, free + 1) - 1, free + 1]), 1), units - 1)
            total += first + advances(units - first, free - 1)
            units = first
        return total

    n_units, next_stored = -(-steps // u), 1
    ends: list[int] = []
    while next_stored < n_units:  # invariant: `ends` are the units of the checkpoints before unit `next_stored`
        r = 0
        if len(ends) == slots:
            bounds = [0, *ends, next_stored]
            needs = [repetitions(bounds[k + 2] - bounds[k], slots - k + 1) for k in range(slots)]
            r = min(needs)
            del ends[needs.index(r)]
        ends.append(next_stored)
        next_stored += max(1, r)
    segments = itertools.pairwise([0, *ends, n_units])
    return 2 * steps + u * sum(advances(b - a, slots - k) for k, (a, b) in enumerate(segments))
