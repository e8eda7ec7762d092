"""The log of a training run: metrics of each step, and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..transforms.core.report import Report, Result, Table


@dataclass(frozen=True, eq=False)
class Log(Result):
    """The result of a training run.

    Attributes:
      steps: number of steps done.
      chunk: steps per dispatch, as passed or chosen.
      metrics: name -> numpy array [steps, ...], one row for each step.
      elapsed_s: wall time, compilation included.
      compile_s: the part of it for tracing and compilation.
      waited: the fraction, 0 to 1, of the remaining time in which the loop waited for the next batch or copied it.
      step_s: chunk -> seconds per step, as measured to choose the chunk; empty if the chunk was passed.
      ended: why the training ended.
    """

    steps: int
    chunk: int
    metrics: dict[str, Any]
    elapsed_s: float
    compile_s: float
    waited: float
    step_s: dict[int, float] = field(default_factory=dict)
    ended: str = ""

    @property
    def steps_per_s(self) -> float:
        """Steps per second of wall time, compilation left out."""
        return self.steps / max(self.elapsed_s - self.compile_s, 1e-9)

    def report(self) -> Report:
        """The time, and a row for the speed, the chunk and each metric."""
        measured = ", ".join(f"{size}: {seconds * 1e3:.3g} ms" for size, seconds in self.step_s.items())
        rows = [
            ("speed", f"{self.steps_per_s:.4g} steps/s; {self.waited:.1%} of the time waiting for batches"),
            ("chunk", f"{self.chunk}" + (f"; a step took, by chunk, {measured}" if measured else "")),
        ]
        for name, values in self.metrics.items():
            if isinstance(values, np.ndarray) and values.ndim == 1 and len(values):
                rows.append((name, f"{values[0]:.4g} → {values[-1]:.4g}"))
        head = f"{self.steps:,} steps in {self.elapsed_s:.3g} s, {self.compile_s:.3g} s of it compiling"
        return Report((head, Table([*rows, ("ended", self.ended)])))
