"""Tracing beside eager execution: what each does with a function, in one report.

noticing    what Python does while the function runs: lines, branches, loops, prints
refusing    why a function cannot be traced, at the user's line, with the value that was asked for
studying    `study`: runs it eagerly, traced and compiled
reporting   `Study` and `Comparison`: text, notebooks, HTML, dict
"""

from .reporting import Comparison, Study
from .studying import compare, study

__all__ = ["Comparison", "Study", "compare", "study"]
