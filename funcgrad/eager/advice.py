"""Why a function cannot be traced: the line, the value that it asks for, and what to write instead."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from ..transforms.core.errors import FuncgradError
from .line_tracing import is_user_source
from .tape import Node

# JAX's error -> what Python asks of a traced value, and what to write instead
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
      line: the user's line, as "model.py:41 (attention)"; source: its text.
      asked: what Python asks for.
      value: the last single number that this line computed in the eager run, as text; "" if there is none.
      instead: what to write instead.
    """

    error: str
    line: str
    source: str
    asked: str
    value: str
    instead: str

    def __str__(self) -> str:
        value = f" (eagerly, {self.value})" if self.value else ""
        place = f" at {self.line}\n  {self.source}" if self.line else ""
        return f"{self.error}{place}\n  Python asks for {self.asked}{value}\n  instead: {self.instead}"


def refusal(error: Exception, nodes: Sequence[Node]) -> Refusal:
    """Explain why tracing failed; `nodes` are those of the eager run, which did not fail."""
    asked, instead = next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), ("", ""))
    if not asked:
        lines = str(error).splitlines() or [""]
        is_ours = isinstance(error, FuncgradError)
        instead = lines[-1].removeprefix("  try").strip() if is_ours else f"what does not: {lines[0]}"
        asked = "what it has only when it runs"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_source(f.filename)]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    line, source = (f"{place} ({frames[-1].name})", frames[-1].line or "") if frames else ("", "")
    kind = np.integer if isinstance(error, jax.errors.TracerIntegerConversionError) else np.generic
    outputs = (x for node in nodes if place and (node.line or "").rpartition(" ")[0] == place for x in node.outputs)
    numbers = [x for x in outputs if x.size == 1 and jax.dtypes.issubdtype(x.dtype, kind)]
    value = np.array2string(np.asarray(numbers[-1]), precision=4) if numbers else ""
    return Refusal(type(error).__name__, line, source, asked, value, instead)
