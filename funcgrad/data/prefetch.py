"""Feeding: batches that are on the device before the step asks for them.

    producer thread:  wait for a free slot → next(batches) → device_put → queue
    consumer:         queue → free the slot → the step

The queue has no bound; the slots do. So the last word of the producer, an exception or the end, never blocks.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..transforms.core.errors import ArgumentError, DataError, OptionError


def prefetch(batches: Iterable[Any], size: int = 2, sharding: Any = None) -> Feed:
    """Batches kept on the device ahead of the step by a background thread.

    The thread starts at once. An exception in `batches` is raised again at the consumer, with its own type and
    traceback, after the batches that came before it; then the iteration has ended.

    Args:
      batches: any iterable of pytrees of arrays. Host arrays are copied: a producer may fill one buffer over and over.
      size: how many batches wait on the device, at least 1, besides the one that the consumer holds.
      sharding: a jax.sharding.Sharding or a device, or a pytree of them; None leaves the choice to JAX.
    Returns:
      A Feed: an iterator, and a context manager that closes it.
    Raises:
      ArgumentError: `batches` is not iterable, or is one batch: an array, a tuple of arrays or a dict.
      OptionError: `size` is below 1.
      DataError: at the consumer, a leaf of a batch is not an array.

    >>> with prefetch([np.zeros(3), np.ones(3)]) as feed:
    ...     [float(batch.sum()) for batch in feed]
    [0.0, 3.0]
    """
    return Feed(batches, size, sharding)


class Feed:
    """The iterator that `prefetch` returns. Dropping it, or closing it, ends its thread."""

    def __init__(self, batches: Iterable[Any], size: int, sharding: Any):
        if size < 1:
            raise OptionError(f"prefetch needs size of at least 1, not {size}.")
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._slots, self._closed = threading.Semaphore(size), threading.Event()
        self._started_s: float | None = None
        self._ended_s = self._waited_s = 0.0
        # The thread must not hold the feed, or a feed that is dropped would never be collected.
        work = (source(batches, "prefetch"), sharding, self._slots, self._closed, self._ready)
        config: Any = jax.config
        context = config.jax_enable_x64, config.jax_default_device
        self._thread = threading.Thread(target=_produce, args=(work, context), name="funcgrad.prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._slots, self._closed, timeout=1.0)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        batch, error = self._ready.get()
        self._ended_s = time.perf_counter()
        self._started_s = start if self._started_s is None else self._started_s
        self._waited_s += self._ended_s - start
        if error is None:
            self._slots.release()
            return batch
        self.close()
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    @property
    def waited(self) -> float:
        """The fraction, 0 to 1, of the consumer's time that it waited: from its first `next` to the end of its last."""
        return self._waited_s / (self._ended_s - self._started_s) if self._started_s is not None else 0.0

    def close(self) -> None:
        """End the iteration and the thread; waits for the batch that is being made."""
        self._finalizer.detach()
        _stop(self._thread, self._slots, self._closed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _produce(work: tuple[Any, ...], context: tuple[bool, Any]) -> None:
    batches, sharding, slots, closed, ready = work
    x64, device = context  # JAX keeps these per thread
    try:
        with jax.enable_x64(x64), jax.default_device(device):
            while slots.acquire() and not closed.is_set():
                ready.put((to_device(next(batches), sharding), None))
        raise StopIteration
    except BaseException as error:  # StopIteration too: the consumer raises what was raised here
        ready.put((None, error))


def _stop(thread: threading.Thread, slots: threading.Semaphore, closed: threading.Event, timeout: float | None = None):
    closed.set()
    slots.release()
    if thread is not threading.current_thread():
        thread.join(timeout)


def source(batches: Iterable[Any], name: str) -> Any:
    """`iter(batches)`, or an ArgumentError that speaks of `name`."""
    is_array = lambda x: isinstance(x, np.ndarray | jax.Array)
    if isinstance(batches, dict) or is_array(batches) or (isinstance(batches, tuple) and all(map(is_array, batches))):
        what = f"{name} needs an iterable of batches, and got one batch: {type(batches).__name__}."
        raise ArgumentError(what, hint="[batch] * steps, or a generator of batches")
    try:
        return iter(batches)
    except TypeError:
        hint = "call it: batches()" if callable(batches) else "a list, a generator or an iterator of batches"
        raise ArgumentError(f"{name} cannot iterate over batches: {type(batches).__name__}.", hint=hint) from None


def to_device(batch: Any, sharding: Any = None) -> Any:
    """`batch` as jax arrays; host arrays are copied."""
    own = owned(batch)
    if sharding is not None:
        return jax.device_put(own, sharding)
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), own)


def owned(batch: Any) -> Any:
    """`batch` in arrays that no one else writes: host arrays are copied, and on the host until a program takes them.

    JAX may keep the host's own memory on CPU, while a program that runs later reads it.
    """
    try:
        return jax.tree.map(_owned, batch)
    except TypeError:
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
            if dtype.kind in "OSUMm":
                what = f"batch{jax.tree_util.keystr(path)} has dtype {dtype}, and JAX has no such arrays."
                raise DataError(what, hint="make every leaf of a batch an array of numbers") from None
        raise


def _owned(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    is_plain = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" and leaf.dtype.isnative
    return np.array(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)) if is_plain else jnp.array(leaf)
