"""The progress bar of a training run: loss, steps per second, remaining time. Silent without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REFRESH_S = 0.1


@contextmanager
def progress_bar(steps: int, is_shown: bool) -> Iterator[Callable[[int, float | None, float], None]]:
    """Gives `report(done, loss, steps_per_s)`, which draws at most ten times a second, and at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (is_shown and (console.is_terminal or console.is_jupyter)):
        yield lambda done, loss, steps_per_s: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    drawn_s = time.perf_counter()
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # no thread beside the step
        task = progress.add_task("", total=steps)

        def report(done: int, loss: float | None, steps_per_s: float) -> None:
            nonlocal drawn_s
            if is_due := time.perf_counter() - drawn_s >= REFRESH_S:
                drawn_s = time.perf_counter()
            text = "" if loss is None else f"loss {loss:.4g}  "
            progress.update(task, completed=done, description=f"{text}{steps_per_s:.4g} steps/s", refresh=is_due)

        yield report
