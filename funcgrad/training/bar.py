"""The progress bar of a training run: loss, steps/s, time left. Silent where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REFRESH_S = 0.1


@contextmanager
def show(steps: int, shown: bool) -> Iterator[Callable[[int, float | None, float], None]]:
    """Gives `report(done, loss, steps_per_s)`, which draws at most ten times a second, and at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (shown and (console.is_terminal or console.is_jupyter)):
        yield lambda done, loss, steps_per_s: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    drawn = time.perf_counter()
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # no thread beside the step
        task = progress.add_task("", total=steps)

        def report(done: int, loss: float | None, steps_per_s: float) -> None:
            nonlocal drawn
            text = "" if loss is None else f"loss {loss:.4g}  "
            now = time.perf_counter()
            due = now - drawn >= REFRESH_S
            drawn = now if due else drawn
            progress.update(task, completed=done, description=f"{text}{steps_per_s:.4g} steps/s", refresh=due)

        yield report
