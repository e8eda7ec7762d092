"""When a loop of unknown length is checkpointed, and how it is reversed from its checkpoints.

A loop of n steps is cut into units of `residual_steps`; the last unit is short. Checkpoints lie at the starts of units, and
the first unit starts at the loop's own input.

- **Forward**, with all slots full and a new checkpoint to be stored, two neighbouring segments are merged: those whose merged
  segment can be reversed with the fewest repetitions, the earliest of these. With k later checkpoints a segment of at most
  `binomial(k + 1 + r, r)` units is reversed with r repetitions, since these k slots are free when its turn comes. Units are
  stored one in r, as the last segments of the optimal schedule are about so long.
- **Backward**, segments are reversed from the last to the first, each by the binomial schedule with the slots that are free.

Up to (c + 1)(c + 2) / 2 units with c slots no step is computed more than twice after the loop has run; beyond, the number of
steps computed stays within some percent of the optimum for a length that is known before (`evaluations`).

Source: Griewank & Walther 2000, Algorithm 799: revolve, doi:10.1145/347837.347846 (binomial schedule, and the bound);
Stumm & Walther 2010, New algorithms for optimal online checkpointing, doi:10.1137/080742439 (the problem with unknown length).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..core.errors import OptionError


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
        if self.checkpoints > _MOST:
            hint = "residual_steps as large as the longest loop keeps everything"
            raise OptionError(f"Loops takes at most {_MOST:,} checkpoints, and got {self.checkpoints:,}.", hint=hint)


_MOST = 10_000


@functools.cache
def lengths(slots: int) -> np.ndarray:
    """`lengths(c)[r, s]`: how many units s slots, that of the first unit among them, reverse with r repetitions."""
    row, rows = np.ones(slots + 2, np.int64), []  # binomial(s + r, r), each row the running sum of the one before
    for _ in range(64 if slots > 3 else 1024):
        rows.append(row)
        row = np.minimum(np.cumsum(row), 2**30)
    return np.array(rows, np.int32)


def merge(ends: Any, unit: Any) -> tuple[Any, Any]:
    """Which of the stored units makes place for another, and the repetitions that the merged segment needs.

    Args:
      ends: int32 [c], ascending, all slots full; `unit`: int32 scalar, a later one that is to be stored.
    """
    slots = ends.shape[0]
    merged = jnp.append(ends[1:], unit) - jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    needs = jnp.sum(lengths(slots)[:, slots + 1 : 1 : -1] < merged[None], axis=0, dtype=ends.dtype)
    rank = jnp.argmin(needs).astype(ends.dtype)
    return rank, needs[rank]


def advance(units: Any, free: Any, slots: int) -> Any:
    """How far into a segment of at least 2 units its next checkpoint lies, with 1 to `slots` free slots; all if there is none."""
    reach = jnp.asarray(lengths(slots))[:, free + 1]
    repetitions = jnp.argmax(reach >= units)
    return jnp.where(free > 0, jnp.clip(reach[repetitions - 1], 1, units - 1), units - 1)


def evaluations(steps: int, loops: Loops) -> int:
    """How often the body is computed for the gradient of a loop of so many steps, the loop itself included."""
    size, slots = loops.residual_steps, loops.checkpoints
    if 1 < size >= steps:
        return steps
    reach = lengths(slots)
    fewest = lambda units, s: int(np.sum(reach[:, s] < units))

    def advances(units, free):
        total = 0
        while units > 1:
            if not free:
                return total + units * (units - 1) // 2
            first = min(max(int(reach[fewest(units, free + 1) - 1][free + 1]), 1), units - 1)
            total += first + advances(units - first, free - 1)
            units = first
        return total

    units, after = -(-steps // size), 1
    ends: list[int] = []
    for unit in range(1, units):
        if unit < after:
            continue
        most = 0
        if len(ends) == slots:
            bounds = [0, *ends, unit]
            needs = [fewest(bounds[k + 2] - bounds[k], slots - k + 1) for k in range(slots)]
            most = min(needs)
            del ends[needs.index(most)]
        ends.append(unit)
        after = unit + max(1, most)
    bounds = [0, *ends, units]
    between = [advances(b - a, slots - k) for k, (a, b) in enumerate(itertools.pairwise(bounds))]
    return 2 * steps + size * int(sum(between))
