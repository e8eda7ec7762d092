"""`compiled`: the kernels of a compiled program in order, with the equations and the time of each."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from ...core import subjaxprs
from ...core.errors import ArgumentError
from ...core.graph import Graph, trace
from ...core.report import Report, Result, Table
from ...cost.device import Machine
from ...cost.formatting import format_bytes, format_count, format_seconds
from ...cost.operations import is_view
from ...cost.table import Row
from .hlo import parse
from .instructions import Kernel, kernels_of
from .profiling import measured
from .tags import donated, tagged


@dataclass(frozen=True)
class Memory:
    """Bytes that XLA allocates; `alias_bytes` are those of results that are written over arguments."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int


@dataclass(frozen=True, repr=False)
class Compiled(Result):
    """A compiled program. Its text is a table of kernels.

    Attributes:
      name: of the function.
      kernels: in the order in which they run; those of a loop's body stand in the place of the loop.
      vanished: equations without instructions: dead code, constants, common subexpressions.
      memory: bytes of arguments, results and temporaries.
      compile_s: seconds that XLA took.
      elapsed_s: seconds of a call; None if it was not run.
      parts: name of an equation, as in `fg.show(graph, kernels=...)` -> the kernels that compute a part of it.
      executable: JAX's compiled program.
    """

    name: str
    kernels: tuple[Kernel, ...]
    vanished: tuple[Row, ...]
    memory: Memory
    compile_s: float
    elapsed_s: float | None
    parts: dict[str, tuple[Kernel, ...]]
    executable: Any = dataclasses.field(repr=False, compare=False)

    def hlo(self) -> str:
        """The compiled program as XLA prints it."""
        return self.executable.as_text()

    @cached_property
    def is_measured(self) -> bool:
        """Whether its kernels have times."""
        return any(k.elapsed_s is not None for k in self.kernels)

    @cached_property
    def times(self) -> dict[str, float]:
        """Name -> seconds of each measured equation: the time of a kernel is divided equally among its equations."""
        shares = {
            name: [k.elapsed_s / len(k.equations) for k in kernels if k.elapsed_s is not None]
            for name, kernels in self.parts.items()
        }
        return {name: sum(seconds) for name, seconds in shares.items() if seconds}

    def dict(self) -> dict[str, Any]:
        """All of it as plain Python values, for JSON."""
        return {
            "name": self.name,
            "compile_s": self.compile_s,
            "elapsed_s": self.elapsed_s,
            "memory": dataclasses.asdict(self.memory),
            "kernels": [
                {
                    **{f: getattr(k, f) for f in ("name", "kind", "library", "times", "elapsed_s", "scopes", "lines")},
                    **dataclasses.asdict(k.work),
                    "equations": [row.operation for row in k.equations],
                }
                for k in self.kernels
            ],
            "vanished": [{"equation": row.operation, "scope": row.scope, "line": row.line} for row in self.vanished],
        }

    def __repr__(self) -> str:
        temporaries = format_bytes(self.memory.temp_bytes)
        return f"Compiled({self.name}: {len(self.kernels)} kernels, {temporaries} of temporaries)"

    def report(self, *, lines: int = 30, machine: Machine | None = None) -> Report:
        """A table, the longest kernels first if they were measured.

        Args:
          lines: how many kernels are shown.
          machine: adds the roofline time on this machine, as a fraction of each kernel's time.
        """
        count, m = len(self.kernels), self.memory
        call = f", {format_seconds(self.elapsed_s)} a call" if self.elapsed_s is not None else ""
        head = [
            f"{self.name}: {count} kernel{'s' * (count != 1)}{call}, compiled in {format_seconds(self.compile_s)}",
            f"{format_bytes(m.argument_bytes)} of arguments, {format_bytes(m.output_bytes)} of results "
            f"({format_bytes(m.alias_bytes)} written over arguments), {format_bytes(m.temp_bytes)} of temporaries",
        ]
        if self.vanished:
            names = Counter(str(row.eqn.primitive) for row in self.vanished)
            head.append("vanished: " + ", ".join(f"{name} ×{n}" for name, n in names.most_common()))
        total_s = sum(k.elapsed_s or 0 for k in self.kernels) or 1
        rows = [_cells(k, total_s, machine) for k in sorted(self.kernels, key=lambda k: -(k.elapsed_s or 0))]
        numbers = ["time", "share", "runs", "FLOP", "bytes", *(["of roofline"] if machine else [])]
        return Report((*head, Table(rows, [*numbers, "kernel", "equations"], ">" * len(numbers), limit=lines)))


def _cells(k: Kernel, total_s: float, machine: Machine | None) -> list[str]:
    times = ["", ""] if k.elapsed_s is None else [format_seconds(k.elapsed_s), f"{k.elapsed_s / total_s:.1%}"]
    runs = "?" if k.times is None else str(k.times)
    share = k.share(machine) if machine else None
    roofline = ["" if share is None else f"{share:.0%}"] if machine else []
    names = Counter(str(row.eqn.primitive) for row in k.equations)
    equations = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in names.most_common(4)) or "-"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    summary = "  ".join(filter(None, [f"{equations}{more}", *k.scopes[:1]]))
    return [*times, runs, format_count(k.work.flops), format_bytes(k.work.bytes), *roofline, k.sort, summary]


# ------------------------------------------------------------------------------------------------ compiled


def compiled(f: Callable, /, *args: Any, **kwargs: Any) -> Compiled:
    """Compile a program, run it a few times, and list its kernels.

    Args:
      f: function or Graph, also a jitted function: arguments that it donates are copied first.
      *args, **kwargs: its arguments. With `jax.ShapeDtypeStruct` among them, or a Graph without arguments, the program is
        compiled and not run, so it has no times.
    Returns:
      Compiled: kernels with their equations, FLOPs, bytes and times; equations that vanished; memory; `hlo()`.
    Raises:
      ArgumentError: the arguments cannot be traced. Also a TypeError.

    >>> import jax.numpy as jnp
    >>> c = compiled(lambda w, x: jnp.sum(jnp.tanh(x @ w)), jnp.ones((8, 8)), jnp.ones((4, 8)))
    >>> [str(row.eqn.primitive) for k in c.kernels for row in k.equations if k.kind == "matmul"]
    ['dot_general']
    """
    if not callable(f):
        raise ArgumentError(f"compiled takes a function or a Graph, and got {type(f).__name__}.", inputs=f"{f!r:.60}")
    if isinstance(f, Graph):
        types = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in f.in_avals]
        graph, leaves = f, f.leaves(*args, **kwargs) if args or kwargs else types
    else:
        graph = trace(f, *args, **kwargs)
        leaves = jax.tree.leaves((args, kwargs))
    jitted, tags = tagged(graph)
    lowered = jitted.lower(*leaves)
    start_s = time.perf_counter()
    executable = lowered.compile()
    compile_s = time.perf_counter() - start_s
    module = parse(executable.as_text())
    elapsed_s: float | None = None
    seconds: dict[str, float] = {}
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        elapsed_s, seconds = measured(executable, leaves, donated(graph), module.name)
    analysis = executable.memory_analysis()
    sizes = (getattr(analysis, f"{name}_size_in_bytes", 0) for name in ("argument", "output", "alias", "temp"))
    kernels = [dataclasses.replace(k, elapsed_s=seconds.get(k.name)) for k in kernels_of(module, tags)]
    names = {id(tag.row): tag.name for tag in tags}
    parts: dict[str, tuple[Kernel, ...]] = {}
    for kernel in kernels:
        for name in (names[id(row)] for row in kernel.equations):
            parts[name] = (*parts.get(name, ()), kernel)
    operations = (tag for tag in tags if not is_view(tag.row.eqn) and not subjaxprs.bodies(tag.row.eqn))
    vanished = tuple(tag.row for tag in operations if tag.name not in parts)
    return Compiled(graph.name, tuple(kernels), vanished, Memory(*sizes), compile_s, elapsed_s, parts, executable)
