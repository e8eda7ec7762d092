"""`prefetch`: a background thread puts batches on the device ahead of the step.

    producer thread:  wait for a free slot → next(batches) → device_put → queue
    consumer:         queue → free the slot → the step

The slots bound the number of batches, not the queue. So the last item of the producer, an exception, never blocks.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..transforms.core.errors import ArgumentError, DataError, OptionError


def prefetch(batches: Iterable[Any], size: int = 2, sharding: Any = None) -> Feed:
    """An iterator whose background thread keeps batches on the device ahead of the step.

    The thread starts at once. The consumer gets an exception in `batches`, with its type and traceback, after the
    batches before it; this ends the iteration.

    Args:
      batches: an iterable of pytrees of arrays. Host arrays are copied, so a producer may reuse its buffers.
      size: number of batches that wait on the device, at least 1, besides the one that the consumer holds.
      sharding: a jax.sharding.Sharding or a device, or a pytree of them; None leaves the choice to JAX.
    Returns:
      A Feed: an iterator, and a context manager that closes it.
    Raises:
      ArgumentError: `batches` is not iterable, or is one batch: an array, a tuple of arrays or a dict.
      OptionError: `size` is below 1.
      DataError: raised to the consumer: a leaf of a batch is not an array.

    >>> with prefetch([np.zeros(3), np.ones(3)]) as feed:
    ...     [float(batch.sum()) for batch in feed]
    [0.0, 3.0]
    """
    return Feed(batches, size, sharding)


class Feed(Iterator[Any], AbstractContextManager["Feed"]):
    """The iterator that `prefetch` returns. Its thread ends when it is closed, or no longer referenced."""

    def __init__(self, batches: Iterable[Any], size: int, sharding: Any):
        if size < 1:
            raise OptionError(f"prefetch needs size of at least 1, not {size}.")
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._slots, self._closed = threading.Semaphore(size), threading.Event()
        self._started_s: float | None = None
        self._ended_s = self._waited_s = 0.0
        # The thread must not refer to the feed: else the feed is never collected.
        work = batch_iterator(batches, "prefetch"), sharding, self._slots, self._closed, self._ready
        config: Any = jax.config
        context = config.jax_enable_x64, config.jax_default_device  # JAX keeps these per thread
        self._thread = threading.Thread(target=_produce, args=(work, context), name="funcgrad.prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._slots, self._closed, timeout=1.0)
        self._thread.start()

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        start_s = time.perf_counter()
        batch, error = self._ready.get()
        self._ended_s = time.perf_counter()
        self._started_s = start_s if self._started_s is None else self._started_s
        self._waited_s += self._ended_s - start_s
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
        """The fraction, 0 to 1, of time that the consumer waited, from its first `next` to the end of its last."""
        return self._waited_s / (self._ended_s - self._started_s) if self._started_s is not None else 0.0

    def close(self) -> None:
        """End the iteration and the thread; waits until `batches` has returned its next batch."""
        self._finalizer.detach()
        _stop(self._thread, self._slots, self._closed)

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _produce(work: tuple[Any, ...], context: tuple[bool, Any]) -> None:
    batches, sharding, slots, closed, ready = work
    x64, device = context
    try:
        with jax.enable_x64(x64), jax.default_device(device):
            while slots.acquire() and not closed.is_set():
                ready.put((jax.device_put(copy_host_arrays(next(batches)), sharding), None))
        raise StopIteration
    except BaseException as error:  # StopIteration too: the consumer raises it
        ready.put((None, error))


def _stop(thread: threading.Thread, slots: threading.Semaphore, closed: threading.Event, timeout: float | None = None):
    closed.set()
    slots.release()
    if thread is not threading.current_thread():
        thread.join(timeout)


def batch_iterator(batches: Iterable[Any], name: str) -> Any:
    """`iter(batches)`; raises an ArgumentError that names the function `name`."""
    is_array = lambda x: isinstance(x, np.ndarray | jax.Array)
    if isinstance(batches, dict) or is_array(batches) or (isinstance(batches, tuple) and all(map(is_array, batches))):
        what = f"{name} needs an iterable of batches, and got one batch: {type(batches).__name__}."
        raise ArgumentError(what, hint="[batch] * steps, or a generator of batches")
    try:
        return iter(batches)
    except TypeError:
        hint = "call it: batches()" if callable(batches) else "a list, a generator or an iterator of batches"
        raise ArgumentError(f"{name} cannot iterate over batches: {type(batches).__name__}.", hint=hint) from None


def copy_host_arrays(batch: Any) -> Any:
    """`batch` with copies of its host arrays, which stay on the host until a program takes them.

    On CPU, JAX may alias host memory, while a program that runs later reads it.
    """
    try:
        return jax.tree.map(_copy_host_array, batch)
    except TypeError:
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
            if dtype.kind in "OSUMm":
                what = f"batch{jax.tree_util.keystr(path)} has dtype {dtype}, and JAX has no such arrays."
                raise DataError(what, hint="make every leaf of a batch an array of numbers") from None
        raise


def _copy_host_array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    is_numeric = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" and leaf.dtype.isnative
    return np.array(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)) if is_numeric else jnp.array(leaf)
