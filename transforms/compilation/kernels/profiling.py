"""The time of a call, and of each kernel in it, by JAX's profiler in this process."""

from __future__ import annotations

import glob
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

RUNS = 5
_lock = threading.Lock()


def measured(
    executable: Any, leaves: Sequence[Any], donated: Sequence[int], module: str
) -> tuple[float, dict[str, float]]:
    """The wall time of a call, and name of a kernel -> seconds of all its runs in a call: medians and means of `RUNS` calls."""

    def call() -> float:
        arguments = [x.copy() if k in donated else x for k, x in enumerate(leaves)]
        jax.block_until_ready(arguments)
        start_s = time.perf_counter()
        jax.block_until_ready(executable(*arguments))
        return time.perf_counter() - start_s

    call()
    elapsed_s = float(np.median([call() for _ in range(RUNS)]))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    seconds: Counter[str] = Counter()
    with _lock, tempfile.TemporaryDirectory() as folder:
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except RuntimeError:  # a process has one profiler, and it is in use
            return elapsed_s, {}
        try:
            for _ in range(RUNS):
                call()
        finally:
            jax.profiler.stop_trace()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning in its bindings that is an error would abort the process
            for plane in jax.profiler.ProfileData.from_file(path).planes:
                for event in (event for line in plane.lines for event in line.events):
                    stats = dict(event.stats)
                    if stats.get("hlo_module") == module:
                        seconds[stats["hlo_op"]] += event.duration_ns * 1e-9 / RUNS
    return elapsed_s, dict(seconds)
