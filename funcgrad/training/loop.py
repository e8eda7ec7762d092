"""The training loop.

    take_batches   batches from the iterator, copied and checked
    dispatch       one program over one batch or over a chunk of batches; does not wait
    fetch_metrics  metrics to the host, one window later: check for NaN, update the progress bar

Only `fetch_metrics` waits for the device, and always for a dispatch that another one follows. So the device never idles
and never runs ahead by more than a window.
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

from ..data.prefetch import batch_iterator, copy_host_arrays
from ..transforms.core.errors import ArgumentError, DataError, NotFiniteError, OptionError, location
from .bar import REFRESH_S, progress_bar
from .log import Log
from .program import changes, place, program_of, strengthen

WINDOW = 32  # steps in flight before their metrics are fetched
CHUNKS = (8, 32)  # the chunks that "auto" tries after one step per dispatch
TRIALS = 3  # measurements of each chunk; the fastest counts
GAIN = 0.98  # a longer chunk must take at most this fraction of the time per step
SLOW_S = 0.02  # a step that takes longer gains nothing from fewer dispatches
CHUNKS_LEFT = 200  # a chunk is tried if at least this many of its size remain,
COMPILES_LEFT = 10  # and the remaining steps take at least this many compilation times
CHUNK_BYTES = 1 << 28  # the most bytes of batches on the device at once


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

    The result equals that of `for batch in batches: state, metrics = step(state, batch)` for every chunk. `train` copies
    `state` once, so the caller's arrays stay valid. It takes one batch per step, in order.

    chunk="auto" starts with one step per dispatch. It continues with 8 and then 32 steps per dispatch (`lax.scan`) while
    these are faster, measured on steps of this training. It tries a chunk only where it can pay: a step takes less than
    20 ms, at least 200 such chunks remain, the remaining steps take 10 times as long as the compilation, and the batches
    of a chunk fit in 256 MiB. So a short training compiles one program. The last steps, fewer than a chunk, run one at a
    time.

    Args:
      step: a pure function `(state, batch) -> (state, metrics)`, or the result of `fg.step`. `metrics` is a dict of
        arrays; one named "loss" must stay finite.
      state: a pytree of arrays; the step must keep its tree, shapes and dtypes.
      batches: an iterable of pytrees of host or device arrays, all of one tree, shapes and dtypes. If it ends early, the
        training ends too, and the log says so.
      steps: number of steps, at least 1.
      chunk: steps per dispatch, or "auto".
      hooks: functions `hook(step, state, metrics)`, called after each dispatch with the number of steps done, the
        state, and the metrics of the dispatch: name -> numpy array [chunk, ...]. If one returns True, the training
        ends. The next dispatch donates the state: a hook that keeps it must copy it, `jax.tree.map(jnp.copy, state)`.
        The loop waits for the device before it calls the hooks.
      progress: whether to show a progress bar; it appears only if stderr is a terminal.
    Returns:
      The last state, and the Log.
    Raises:
      NotFiniteError: the "loss" became NaN or infinite. Names the step, and the values of the batch that are not finite.
      DataError: no batch at all, a batch unlike the first in tree, shape or dtype, or a leaf that is not an array.
      ArgumentError: the step changes the tree, shapes or dtypes of the state, or does not return (state, metrics);
        `batches` is one batch: an array, a tuple of arrays or a dict.
      OptionError: `steps`, `chunk` or `hooks` is invalid.
      Every exception that ends the training, also one raised by `batches` or a KeyboardInterrupt, has the attributes
      `.state`, the state after the steps before it, and `.log`. A NotFiniteError comes up to 40 steps or two chunks late;
      its `.state` is the latest.

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
    with progress_bar(steps, progress) as report:
        run = _Run(step, state, batch_iterator(batches, "train"), steps, hooks, report)
        with run.recoverable():
            if chunk == "auto":
                run.choose_chunk()
            else:
                run.chunk = int(chunk)
            while not run.ended:
                run.run_batches(run.take_batches(run.chunk), run.chunk)
            run.fetch_metrics()
    return run.state, run.log()


class _Run:
    """One run of `train`: the steps done, the dispatches in flight, and the clocks."""

    def __init__(self, step: Any, state: Any, batches: Iterator[Any], steps: int, hooks: Any, report: Any):
        self.step, self.batches, self.steps, self.hooks, self.report = step, batches, steps, hooks, report
        self.state = _copied(state)
        self.first_batch: Any = None  # all others must have its tree, shapes and dtypes
        self.chunk, self.done, self.ended = 1, 0, ""
        self.batch_error: Exception | None = None  # raised after the steps on the batches before it
        self.in_flight: list[tuple[list[Any], Any]] = []  # batches and metrics of each dispatch that is not fetched
        self.metrics: list[dict[str, Any]] = []  # of each fetched dispatch
        self.fetched = 0  # number of steps whose metrics are on the host
        self.compiled_sizes: set[int] = set()
        self.step_s: dict[int, float] = {}
        self.start_s = self.fetched_s = time.perf_counter()
        self.compile_s = self.wait_s = self.hooks_s = 0.0
        self.is_dispatching = False
        self.interrupts: list[int] = []

    @contextmanager
    def recoverable(self) -> Iterator[None]:
        """Attach the state and the log to exceptions. A Ctrl-C waits while `is_dispatching`: then there is no state."""
        handler: Any = signal.getsignal(signal.SIGINT)
        is_replaced = callable(handler) and threading.current_thread() is threading.main_thread()

        def interrupted(number: int, frame: Any) -> None:
            # Python drops an exception that is raised during garbage collection: the next dispatch raises it once more.
            if self.is_dispatching or handler is signal.default_int_handler:
                self.interrupts.append(number)
            if not self.is_dispatching:
                handler(number, frame)

        if is_replaced:
            signal.signal(signal.SIGINT, interrupted)
        try:
            yield
        except BaseException as error:
            with suppress(Exception):
                self.fetch_metrics(check=False)
            self.ended = type(error).__name__
            vars(error).update(state=self.state, log=self.log())
            if self.done:
                error.add_note(f"steps done: {self.done:,}. `.state` on this exception holds them, `.log` the metrics")
            raise
        finally:
            if is_replaced:
                signal.signal(signal.SIGINT, handler)

    def take_batches(self, count: int) -> list[Any]:
        """The next `count` batches, fewer if the steps or the batches end."""
        batches: list[Any] = []
        start_s = time.perf_counter()
        try:
            for number in range(self.done, min(self.done + count, self.steps)):
                batches.append(self.check_batch(next(self.batches), number))
        except StopIteration:
            self.ended = f"the batches ended after {self.done + len(batches)} of {self.steps} steps"
            if self.first_batch is None:
                hint = "an iterator can be consumed only once: pass a list, or create the iterator again"
                self.batch_error = DataError("train got no batch: the batches ended before the first step.", hint=hint)
        except Exception as error:
            self.batch_error = error
        self.wait_s += time.perf_counter() - start_s
        return batches

    def check_batch(self, batch: Any, number: int) -> Any:
        """A copy of `batch`, which must have the types of the first one. The program moves host arrays to the device."""
        batch = copy_host_arrays(batch)
        if self.first_batch is None:
            self.first_batch, self.batch_types, self.state = batch, _types(batch), place(self.state, batch)
            self.program = program_of(self.step, self.state)
        elif _types(batch) != self.batch_types:
            what = f"train needs batches of one tree, shapes and dtypes, but batch {number} is not like the first."
            hint = "pad or drop what does not fill a batch"
            raise DataError(what, inputs=changes(self.first_batch, batch, "batch"), hint=hint)
        return batch

    def run_batches(self, batches: list[Any], size: int) -> None:
        """Train on `batches`, `size` per dispatch and the rest one by one; then raise the error of the iterator."""
        whole = len(batches) - len(batches) % size
        chunks = [batches[i : i + size] for i in range(0, whole, size)] + [[batch] for batch in batches[whole:]]
        for chunk in chunks:
            self.dispatch(chunk)
            if self.hooks and self.call_hooks():
                self.ended = f"a hook ended it after {self.done} of {self.steps} steps"
                return
        if self.batch_error:
            self.fetch_metrics()
            raise self.batch_error
        if self.done == self.steps:
            self.ended = "all steps done"

    def dispatch(self, batches: list[Any]) -> None:
        """Start one program over `batches`."""
        self.compile(batches)
        try:
            self.is_dispatching = True  # between the donation and the assignment there is no state
            self.state, metrics = self.program.run(self.state, tuple(batches))
            self.in_flight.append((batches, metrics))
            self.done += len(batches)
        finally:
            self.is_dispatching = False
        while self.interrupts:
            signal.raise_signal(self.interrupts.pop())
        if self.done - self.fetched > WINDOW or time.perf_counter() - self.fetched_s > REFRESH_S:
            self.fetch_metrics(keep=1)

    def compile(self, batches: list[Any]) -> None:
        """Compile the program for this number of batches. JAX caches it."""
        if len(batches) not in self.compiled_sizes:
            start_s = time.perf_counter()
            self.state = strengthen(self.program.run, self.state, tuple(batches))
            self.program.run.lower(self.state, tuple(batches)).compile()
            elapsed_s = time.perf_counter() - start_s
            self.compile_s += elapsed_s
            self.program.compile_s = max(self.program.compile_s, elapsed_s)
            self.compiled_sizes.add(len(batches))

    def call_hooks(self) -> bool:
        """Call the hooks; whether one of them ends the training."""
        self.fetch_metrics()
        start_s = time.perf_counter()
        answers = [hook(self.done, self.state, self.metrics[-1]) for hook in self.hooks]
        self.hooks_s += time.perf_counter() - start_s
        return any(answers)

    def fetch_metrics(self, *, keep: int = 0, check: bool = True) -> None:
        """Fetch the metrics of all dispatches in flight but the last `keep`."""
        dispatches = self.in_flight[: len(self.in_flight) - keep]
        if not dispatches:
            return
        metrics = jax.device_get([metrics for _, metrics in dispatches])
        del self.in_flight[: len(dispatches)]
        self.metrics += metrics
        batches = [batch for chunk, _ in dispatches for batch in chunk]
        losses = [loss for row in metrics for loss in row.get("loss", ())]
        first, self.fetched = self.fetched, self.fetched + len(batches)
        for number, loss, batch in zip(range(first, self.fetched), losses, batches, strict=False):
            if check and not np.isfinite(loss).all():
                raise _not_finite(self.step, number, loss, batch)
        self.fetched_s = time.perf_counter()
        steps_per_s = self.fetched / max(self.fetched_s - self.start_s - self.compile_s, 1e-9)
        self.report(self.fetched, float(np.mean(losses[-1])) if losses else None, steps_per_s)

    def choose_chunk(self) -> None:
        """Choose the chunk with the least time per step, measured on steps of this training."""
        self.measure(1)
        batch_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.first_batch))
        for size in CHUNKS:
            remaining, best_s = self.steps - self.done, self.step_s.get(self.chunk, math.inf)
            if self.ended or remaining < CHUNKS_LEFT * size or size * batch_bytes > CHUNK_BYTES:
                return
            if best_s > SLOW_S or remaining * best_s < COMPILES_LEFT * self.program.compile_s:
                return
            self.measure(size)
            if self.step_s.get(size, math.inf) > GAIN * best_s:
                return
            self.chunk = size

    def measure(self, size: int) -> None:
        """Train for a few windows of `size` steps per dispatch, and record the least seconds per step."""
        for trial in range(TRIALS):
            batches = self.take_batches(max(size, 8))
            if len(batches) >= size:
                self.compile(batches[:size])
            jax.block_until_ready(self.state)
            start_s = time.perf_counter() - self.hooks_s
            self.run_batches(batches, size)
            if self.ended:
                return
            jax.block_until_ready(self.state)
            step_s = (time.perf_counter() - self.hooks_s - start_s) / len(batches)
            self.step_s[size] = min(step_s, self.step_s.get(size, math.inf))
            if trial and self.step_s[size] > 1.5 * self.step_s[self.chunk]:
                return  # as the gradient of a convolution inside a scan, on CPU

    def log(self) -> Log:
        """The log of the steps done so far."""
        elapsed_s = time.perf_counter() - self.start_s
        metrics = jax.tree.map(lambda *rows: np.concatenate(rows), *self.metrics) if self.metrics else {}
        waited = self.wait_s / max(elapsed_s - self.compile_s, 1e-9)
        return Log(self.done, self.chunk, metrics, elapsed_s, self.compile_s, waited, self.step_s, self.ended)


def _copied(state: Any) -> Any:
    """A copy of the state, each array on its own devices. (jnp.copy would compile once per shape.)"""

    def copy(path: Any, leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, leaf.sharding if leaf.committed else None, may_alias=False)
        try:
            return jax.device_put(np.array(leaf) if isinstance(leaf, np.ndarray) else leaf)
        except TypeError:
            what = f"train needs a state of arrays, but state{keystr(path)} is of type {type(leaf).__name__}."
            raise ArgumentError(what, hint="close over it in the step") from None

    return jax.tree_util.tree_map_with_path(copy, state)


def _types(batch: Any) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _not_finite(step: Any, number: int, loss: Any, batch: Any) -> NotFiniteError:
    causes = [
        f"batch{keystr(path)} has {count} {kind} of {leaf.size}"
        for path, leaf in tree_leaves_with_path(batch)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        for kind, is_kind in (("NaN", jnp.isnan), ("infinite", jnp.isinf))
        if (count := int(is_kind(leaf).sum()))
    ]
    at, inputs = location(getattr(step, "loss", step)), ", ".join(causes) or "the batch is finite"
    hint = "a smaller learning rate, clipped gradients, or fg.nan_origin(step, state, batch) of the state before it"
    hint = "repair the batch: it holds values that are not finite" if causes else hint
    return NotFiniteError(f"train got a loss of {loss} at step {number}.", at=at, inputs=inputs, hint=hint)
