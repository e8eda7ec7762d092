"""The training loop.

    take      batches from the iterator, in arrays of their own
    dispatch  one program over one batch or a chunk of them; nothing is waited for
    settle    metrics to the host, a window later: look for NaN, tell the progress bar

Only `settle` waits for the device, and always for a dispatch that another one follows. So the device never idles, and
never runs ahead by more than a window.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ..data.prefetch import owned, source
from ..transforms.core.errors import ArgumentError, DataError, NotFiniteError, OptionError, location
from .bar import REFRESH_S, show
from .log import Log
from .program import changes, place, prepare, strengthen

WINDOW = 32  # steps in flight before their metrics are fetched
CHUNKS = (8, 32)  # what "auto" tries, after one step at a time
TRIALS = 3  # measurements of each; the fastest counts
GAIN = 0.98  # a longer chunk must take at most this fraction of the time
SLOW_S = 0.02  # a step as long as this gains nothing from fewer dispatches
CHUNKS_LEFT = 200  # so many chunks must be left,
COMPILES_LEFT = 10  # and so many times the time of a compilation
CHUNK_BYTES = 1 << 28  # of batches on the device at once


def train(
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    state: Any,
    batches: Iterable[Any],
    *,
    steps: int,
    chunk: int | str = "auto",
    hooks: Sequence[Callable[[int, Any, dict[str, Any]], Any]] = (),
    progress: bool = True,
) -> tuple[Any, Log]:
    """Train for `steps` steps, compiled, with the state donated from step to step.

    The result is that of `for batch in batches: state, metrics = step(state, batch)`, whatever the chunk. `state` is
    copied once, so the caller's arrays stay valid; one batch is taken per step, in order.

    chunk="auto" starts with one step per dispatch, and goes on to 8 and then 32 steps per dispatch (`lax.scan`) while
    that is faster, as measured on steps of this very training. A chunk is tried only where that can pay: a step takes
    less than 20 ms, at least 200 such chunks are left, the steps left would take 10 times as long as the compilation
    did, and the batches of a chunk fit in 256 MiB. So a short training compiles one program. What is left in the end
    and does not fill a chunk is done one step at a time.

    Args:
      step: a pure function `(state, batch) -> (state, metrics)`, or what `fg.step` returns. `metrics` is a dict of
        arrays; one named "loss" must stay finite.
      state: a pytree of arrays; the step must keep its tree, shapes and dtypes.
      batches: an iterable of pytrees of arrays, host or device, all of one tree, shapes and dtypes. Where it ends
        early, the training ends too, and the log says so.
      steps: how many steps, at least 1.
      chunk: steps per dispatch, or "auto".
      hooks: functions `hook(step, state, metrics)`, called after each dispatch with the number of steps done, the
        state, and the metrics of the dispatch: name -> numpy array [chunk, ...]. If one returns True, the training
        ends. The state is donated when the hooks have returned: copy what is kept, `jax.tree.map(jnp.copy, state)`.
        The loop waits for the device before it calls them.
      progress: show a progress bar, if stderr is a terminal.
    Returns:
      The last state, and the Log.
    Raises:
      NotFiniteError: the "loss" became NaN or infinite; says at which step, and what in the batch was so already.
      DataError: no batch at all, a batch unlike the first in tree, shape or dtype, or one that is not of arrays.
      ArgumentError: the step changes the tree, shapes or dtypes of the state, or does not return (state, metrics);
        `batches` is one batch: an array, a tuple of arrays or a dict.
      OptionError: `steps`, `chunk` or `hooks` make no sense.
      Whatever ends the training, be it raised by `batches` or a KeyboardInterrupt, carries the `.state` after the steps
      before it and the `.log`. A NotFiniteError comes up to 40 steps or two chunks late; its `.state` is the latest.

    >>> step = lambda w, x: (0.9 * w + 0.1 * x, {"loss": (w - x) ** 2})
    >>> state, log = train(step, jnp.zeros(()), [jnp.ones(())] * 100, steps=50)
    >>> print(log.metrics["loss"].shape, log.chunk, log.ended)
    (50,) 1 all steps done
    """
    if steps < 1:
        raise OptionError(f"train needs steps of at least 1, not {steps}.")
    if chunk != "auto" and (isinstance(chunk, str) or chunk < 1):
        raise OptionError(f'train needs a chunk of at least 1, or "auto", not {chunk!r}.')
    if callable(hooks) or not all(map(callable, hooks)):
        raise OptionError("train needs hooks to be a tuple of functions.", hint="hooks=(hook,)")
    with show(steps, progress) as report:
        run = _Run(step, state, source(batches, "train"), steps, hooks, report)
        with run.recoverable():
            if chunk == "auto":
                run.choose()
            else:
                run.chunk = int(chunk)
            while not run.ended:
                run.spend(run.take(run.chunk), run.chunk)
            run.settle()
    return run.state, run.log()


class _Run:
    """One run of `train`: what has been done, what is in flight, and the clocks."""

    def __init__(self, step: Any, state: Any, batches: Iterator[Any], steps: int, hooks: Any, report: Any):
        self.step, self.batches, self.steps, self.hooks, self.report = step, batches, steps, hooks, report
        self.state = _copied(state)
        self.first: Any = None  # the batch that all others must look like
        self.chunk, self.done, self.ended = 1, 0, ""
        self.failure: Exception | None = None  # met while batches were taken, raised once those before it are used
        self.flying: list[tuple[list[Any], Any]] = []  # the batches and metrics of each dispatch not yet settled
        self.rows: list[dict[str, Any]] = []  # the metrics of each settled dispatch
        self.settled = 0
        self.compiled: set[int] = set()
        self.step_s: dict[int, float] = {}
        self.start_s = self.settled_s = time.perf_counter()
        self.compile_s = self.wait_s = self.hooks_s = 0.0
        self.busy = False
        self.interrupts: list[int] = []

    @contextmanager
    def recoverable(self) -> Iterator[None]:
        """What is raised here carries the state and the log. A Ctrl-C waits while `busy`: there is no state then."""
        handler: Any = signal.getsignal(signal.SIGINT)
        ours = callable(handler) and threading.current_thread() is threading.main_thread()

        def interrupted(number: int, frame: Any) -> None:
            # What is raised while Python collects garbage is lost: so it is raised once more at the next dispatch.
            if self.busy or handler is signal.default_int_handler:
                self.interrupts.append(number)
            if not self.busy:
                handler(number, frame)

        if ours:
            signal.signal(signal.SIGINT, interrupted)
        try:
            yield
        except BaseException as error:
            with suppress(Exception):
                self.settle(check=False)
            self.ended = type(error).__name__
            vars(error).update(state=self.state, log=self.log())
            if self.done:
                error.add_note(f"steps done: {self.done:,}. `.state` on this exception holds them, `.log` the metrics")
            raise
        finally:
            if ours:
                signal.signal(signal.SIGINT, handler)

    def take(self, count: int) -> list[Any]:
        """The next batches: `count` of them, fewer if the steps or the batches end."""
        taken: list[Any] = []
        start = time.perf_counter()
        try:
            for number in range(self.done, min(self.done + count, self.steps)):
                taken.append(self.admit(next(self.batches), number))
        except StopIteration:
            self.ended = f"the batches ended after {self.done + len(taken)} of {self.steps} steps"
            if self.first is None:
                hint = "an iterator serves once: give a list, or make the iterator anew"
                self.failure = DataError("train got no batch: the batches ended before the first step.", hint=hint)
        except Exception as error:
            self.failure = error
        self.wait_s += time.perf_counter() - start
        return taken

    def admit(self, batch: Any, number: int) -> Any:
        """`batch` in arrays of its own, if it looks like the first one; the program takes host arrays to the device."""
        batch = owned(batch)
        if self.first is None:
            self.first, self.signature, self.state = batch, _signature(batch), place(self.state, batch)
            self.program = prepare(self.step, self.state)
        elif _signature(batch) != self.signature:
            what = f"train needs batches of one tree, shapes and dtypes, but batch {number} is not like the first."
            found = changes(self.first, batch, "batch")
            raise DataError(what, inputs=found, hint="pad or drop what does not fill a batch")
        return batch

    def spend(self, batches: list[Any], size: int) -> None:
        """Train on `batches`, `size` of them per dispatch and the rest one by one; then raise what `take` met."""
        whole = len(batches) - len(batches) % size
        parts = [batches[i : i + size] for i in range(0, whole, size)] + [[batch] for batch in batches[whole:]]
        for part in parts:
            self.dispatch(part)
            if self.hooks and self.visit():
                self.ended = f"a hook ended it after {self.done} of {self.steps} steps"
                return
        if self.failure:
            self.settle()
            raise self.failure
        if self.done == self.steps:
            self.ended = "all steps done"

    def dispatch(self, batches: list[Any]) -> None:
        """Start one program over `batches`."""
        self.compile(batches)
        try:
            self.busy = True  # between the donation and the assignment there is no state
            self.state, metrics = self.program.run(self.state, tuple(batches))
            self.flying.append((batches, metrics))
            self.done += len(batches)
        finally:
            self.busy = False
        while self.interrupts:
            signal.raise_signal(self.interrupts.pop())
        if self.done - self.settled > WINDOW or time.perf_counter() - self.settled_s > REFRESH_S:
            self.settle(keep=1)

    def compile(self, batches: list[Any]) -> None:
        """Compile for so many batches; JAX keeps the result for the calls."""
        if len(batches) not in self.compiled:
            start = time.perf_counter()
            self.state = strengthen(self.program.run, self.state, tuple(batches))
            self.program.run.lower(self.state, tuple(batches)).compile()
            seconds = time.perf_counter() - start
            self.compile_s += seconds
            self.program.compile_s = max(self.program.compile_s, seconds)
            self.compiled.add(len(batches))

    def visit(self) -> bool:
        """Call the hooks; whether one of them ends the training."""
        self.settle()
        start = time.perf_counter()
        answers = [hook(self.done, self.state, self.rows[-1]) for hook in self.hooks]
        self.hooks_s += time.perf_counter() - start
        return any(answers)

    def settle(self, *, keep: int = 0, check: bool = True) -> None:
        """Fetch the metrics of all dispatches in flight but the last `keep`."""
        landed = self.flying[: len(self.flying) - keep]
        if not landed:
            return
        fetched = jax.device_get([metrics for _, metrics in landed])
        del self.flying[: len(landed)]
        self.rows += fetched
        batches = [batch for part, _ in landed for batch in part]
        losses = [loss for metrics in fetched for loss in metrics.get("loss", ())]
        first, self.settled = self.settled, self.settled + len(batches)
        for number, loss, batch in zip(range(first, self.settled), losses, batches, strict=False):
            if check and not np.isfinite(loss).all():
                raise _not_finite(self.step, number, loss, batch)
        self.settled_s = time.perf_counter()
        rate = self.settled / max(self.settled_s - self.start_s - self.compile_s, 1e-9)
        self.report(self.settled, float(np.mean(losses[-1])) if losses else None, rate)

    def choose(self) -> None:
        """Choose the chunk that takes the least time per step, measured on steps of this training."""
        self.measure(1)
        batch_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.first))
        for size in CHUNKS:
            left = self.steps - self.done
            if self.ended or left < CHUNKS_LEFT * size or size * batch_bytes > CHUNK_BYTES:
                return
            best_s = self.step_s[self.chunk]
            if best_s > SLOW_S or left * best_s < COMPILES_LEFT * self.program.compile_s:
                return
            self.measure(size)
            if self.step_s.get(size, math.inf) > GAIN * best_s:
                return
            self.chunk = size

    def measure(self, size: int) -> None:
        """Train for a few windows of `size` steps per dispatch, and note the seconds per step of the fastest."""
        for trial in range(TRIALS):
            batches = self.take(max(size, 8))
            if len(batches) >= size:
                self.compile(batches[:size])
            jax.block_until_ready(self.state)
            start = time.perf_counter() - self.hooks_s
            self.spend(batches, size)
            if self.ended:
                return
            jax.block_until_ready(self.state)
            seconds = (time.perf_counter() - self.hooks_s - start) / len(batches)
            self.step_s[size] = min(seconds, self.step_s.get(size, math.inf))
            if trial and self.step_s[size] > 1.5 * self.step_s[self.chunk]:
                return  # as a convolution's gradient inside a scan, on CPU

    def log(self) -> Log:
        """What has been done so far."""
        elapsed_s = time.perf_counter() - self.start_s
        metrics = jax.tree.map(lambda *rows: np.concatenate(rows), *self.rows) if self.rows else {}
        waited = self.wait_s / max(elapsed_s - self.compile_s, 1e-9)
        return Log(self.done, self.chunk, metrics, elapsed_s, self.compile_s, waited, self.step_s, self.ended)


def _copied(state: Any) -> Any:
    """The state in arrays that no one else holds, each where it was. (jnp.copy would compile once per shape.)"""

    def copy(path: Any, leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, leaf.sharding if leaf.committed else None, may_alias=False)
        try:
            return jax.device_put(np.array(leaf) if isinstance(leaf, np.ndarray) else leaf)
        except TypeError:
            what = f"train needs a state of arrays, but state{keystr(path)} is of type {type(leaf).__name__}."
            raise ArgumentError(what, hint="close over it in the step") from None

    return jax.tree_util.tree_map_with_path(copy, state)


def _signature(batch: Any) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _not_finite(step: Any, number: int, loss: Any, batch: Any) -> NotFiniteError:
    found = []
    for path, leaf in tree_leaves_with_path(batch):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            counts = {"NaN": int(jnp.isnan(leaf).sum()), "infinite": int(jnp.isinf(leaf).sum())}
            found += [
                f"batch{keystr(path)} has {count} {kind} of {leaf.size}" for kind, count in counts.items() if count
            ]
    hint = "a smaller learning rate, clipped gradients, or fg.nan_origin(step, state, batch) of the state before it"
    return NotFiniteError(
        f"train got a loss of {loss} at step {number}.",
        at=location(getattr(step, "loss", step)),
        inputs=", ".join(found) or "the batch is finite",
        hint="mend the batch: the loss only passes on what it was given" if found else hint,
    )
