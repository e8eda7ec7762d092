"""Why a function cannot be traced: the line, the value that was asked for, and what to write instead."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from ..recording import Node
from ..transforms import _jax

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
        "jnp.where(mask, x, 0), or jnp.nonzero(mask, size=...) for a fixed number of them",
    ),
    jax.errors.ConcretizationTypeError: (
        "a number",
        "keep it an array, as in x.astype(float); or name the argument that it comes from in static_argnames",
    ),
}


@dataclass(frozen=True)
class Refusal:
    """Where a function needs a value that tracing does not have.

    Attributes:
      error: the name of JAX's exception.
      line: the user's line, as "model.py:41 (attention)"; source: what stands there.
      asked: what Python asked for.
      value: the latest value that this line computed when the function ran eagerly, as text; "" if there is none.
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
        return f"{self.error} at {self.line}\n  {self.source}\n  Python asks for {self.asked}{seen}\n  instead: {self.instead}"


def refusal(error: Exception, nodes: Sequence[Node]) -> Refusal | None:
    """Explain why tracing failed; None for an error that tracing has no part in."""
    known = next((pair for kind, pair in _HINTS.items() if isinstance(error, kind)), None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _jax.is_user_file(f.filename)]
    if known is None or not frames:
        return None
    line = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})"
    place = line.rpartition(" ")[0]
    values = [x for node in nodes if (node.line or "").rpartition(" ")[0] == place for x in node.outputs]
    value = np.array2string(np.asarray(values[-1]), threshold=8, precision=4) if values else ""
    return Refusal(type(error).__name__, line, frames[-1].line or "", known[0], value, known[1])
