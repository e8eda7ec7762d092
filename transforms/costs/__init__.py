"""What a program costs: FLOPs, bytes, memory.

Read `table` (`cost` and its result), `steps` (what runs, and how often), `operations` (the table of rules), `timeline` (live
bytes), `materialised` (the temporaries that XLA needs, by the tables of `backends`), `trips` (how often loops run), `machines`
(the roofline).
"""

from .machines import Bound, Machine, machine
from .operations import Work
from .table import Cost, Group, Row, cost
from .timeline import Timeline

__all__ = ["Bound", "Cost", "Group", "Machine", "Row", "Timeline", "Work", "cost", "machine"]
