"""Finished lanes of a batched loop: the loop runs until no lane is running, and a finished lane keeps its values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def select(running: Any, new: Sequence[Any], old: Iterable[Any]) -> list[Any]:
    """For each lane the `new` values where it is running, and the `old` ones where it is finished.

    Args:
      running: bool[*lanes], the leading axes of all values; of shape (), or None, for a loop without lanes: all is `new`.
    """
    if not np.ndim(running):
        return list(new)
    return [jnp.where(expand(running, a), a, b) for a, b in zip(new, old, strict=True)]


def expand(predicate: Any, value: Any) -> Any:
    """A predicate of leading axes of `value`, with as many axes as `value`."""
    return jnp.reshape(predicate, (*predicate.shape, *[1] * (value.ndim - predicate.ndim)))
