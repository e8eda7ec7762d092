"""The exception tree. Each class is also the built-in that a JAX user expects.

A message says what is wrong, where in the user's code, with which inputs, and what to do next:

    NotScalarError: grad needs a float scalar of shape (), but loss returned float32[8].
      at      train.py:12 (loss)
      try     reduce it, as in jnp.mean(loss(...)), or take fg.jacrev(loss)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable


class FuncgradError(Exception):
    """Base of all errors raised by funcgrad.

    Args:
      what: one sentence with the user's names in it.
      at: where in the user's code, e.g. from `location`.
      inputs: the values that led here, as short text.
      hint: the next step.
    """

    def __init__(self, what: str, *, at: str | None = None, inputs: str | None = None, hint: str | None = None):
        rows = (("at", at), ("inputs", inputs), ("try", hint))
        super().__init__("\n".join([what, *(f"  {label:<7} {text}" for label, text in rows if text)]))


class NotScalarError(FuncgradError, TypeError):
    """A gradient was asked of a function whose output is not a float scalar."""


class ArgumentError(FuncgradError, TypeError):
    """An argument has the wrong tree, shape or dtype, or cannot be differentiated."""


class OptionError(FuncgradError, ValueError):
    """An option of a transform does not fit the function or the arguments."""


class DuplicateRule(FuncgradError, ValueError):
    """A table already has a rule for the primitive."""


class GraphError(FuncgradError, ValueError):
    """A graph is not well formed."""


class BudgetError(FuncgradError, ValueError):
    """The smallest program needs more memory than the budget.

    Attributes:
      smallest: bytes of temporaries of the smallest program.
    """

    smallest: int = 0


class RetraceError(FuncgradError, RuntimeError):
    """A compiled function was traced more often than `max_retraces` allows."""


class DataError(FuncgradError, ValueError):
    """There are no batches, or they do not fit the training step."""


class NotFiniteError(FuncgradError, FloatingPointError):
    """A metric that must be finite became NaN or infinite."""


class MissingExtra(FuncgradError, ImportError):
    """An optional package is not installed."""


def location(f: Callable) -> str | None:
    """The definition of `f` as "file.py:line (name)"; None if it has no Python source."""
    code = getattr(inspect.unwrap(getattr(f, "func", f)), "__code__", None)
    if code is None:
        return None
    return f"{code.co_filename}:{code.co_firstlineno} ({code.co_name})"
