"""Why a function cannot be traced: the line, the value that was asked for, and what to write instead."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from ..transforms.core.errors import FuncgradError
from .line_tracing import is_users
from .tape import Node

# error of JAX's -> what Python asked of a traced value, and what to write instead
_HINTS: dict[type[Exception], tuple[str, str]] = {
    jax.errors.TracerBoolConversionError: (
        "a truth value",
        "jax.lax.cond or jnp.where for a branch, jax.lax.while_loop for a loop; or name what decides it in static_argnames",
    ),
    jax.errors.TracerIntegerConversionError: (
        "an index or a length",
        "index with jnp.take or x[i] of a jax.Array; name a length in static_argnames",
    ),
    jax.errors.TracerArrayConversionError: ("a NumPy array", "the function of jax.numpy in the place of NumPy's"),
    jax.errors.NonConcreteBooleanIndexError: (
        "as many elements as a mask has",
        "jnp.where(mask, x, 0), or size= for a fixed number of them, as in jnp.nonzero(mask, size=8)",
    ),
    jax.errors.ConcretizationTypeError: (
        "a number",
        "keep it an array, as in x.astype(float); where it is a length, size= or an argument named in static_argnames",
    ),
}


@dataclass(frozen=True)
class Refusal:
    """Where a function needs a value that tracing does not have.

    Attributes:
      error: the name of JAX's exception.
      line: the user's line, as "model.py:41 (attention)"; source: what stands there.
      asked: what Python asked for.
      value: the single number that this line computed last when the function ran eagerly, as text; "" if there is none.
      instead: what to write.
    """

    error: str
    line: str
    source: str
    asked: str
    value: str
    instead: str

    def __str__(self) -> str:
        seen = f" (eagerly, {self.value})" if self.value else ""
        where = f" at {self.line}\n  {self.source}" if self.line else ""
        return f"{self.error}{where}\n  Python asks for {self.asked}{seen}\n  instead: {self.instead}"


def refusal(error: Exception, nodes: Sequence[Node]) -> Refusal:
    """Explain why tracing failed where the eager run did not."""
    lines = str(error).splitlines() or [""]
    instead = (
        lines[-1].removeprefix("  try").strip() if isinstance(error, FuncgradError) else f"what does not: {lines[0]}"
    )
    general = "what it has only when it runs", instead
    asked, instead = next((pair for kind, pair in _HINTS.items() if isinstance(error, kind)), general)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    line = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else ""
    place = line.rpartition(" ")[0]
    there = (node for node in nodes if place and (node.line or "").rpartition(" ")[0] == place)
    kind = np.integer if isinstance(error, jax.errors.TracerIntegerConversionError) else np.generic
    numbers = [x for node in there for x in node.outputs if x.size == 1 and jax.dtypes.issubdtype(x.dtype, kind)]
    value = np.array2string(np.asarray(numbers[-1]), precision=4) if numbers else ""
    return Refusal(type(error).__name__, line, (frames[-1].line or "") if frames else "", asked, value, instead)
