"""The log: what a training run did, step by step and in sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..transforms.core.report import Report, Result, Table


@dataclass(frozen=True, eq=False)
class Log(Result):
    """What `train` did.

    Attributes:
      steps: how many steps were done.
      chunk: steps per dispatch, given or chosen.
      metrics: name -> numpy array [steps, ...], one row for each step.
      elapsed_s: wall time, compilation included.
      compile_s: of it, tracing and compiling.
      waited: the fraction, 0 to 1, of the other time in which the next batch was waited for or moved to the device.
      step_s: chunk -> seconds per step, as measured to choose the chunk; empty where it was given.
      ended: why it ended.
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
