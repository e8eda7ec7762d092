"""prefetch: order, the device, the thread's whole life, and errors where the consumer stands."""

from __future__ import annotations

import gc
import sys
import threading
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core.errors import ArgumentError, DataError, OptionError
from jax.sharding import NamedSharding, PartitionSpec

from funcgrad.data.prefetch import prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "funcgrad.prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    gc.collect()
    assert not threads()


def counting(n=10**9):
    for i in range(n):
        yield {"x": np.full(3, i, np.float32)}


def first(batch):
    return int(batch["x"][0])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_come_in_order_and_on_the_device(size):
    feed = prefetch(counting(20), size)
    batches = list(feed)
    assert [first(batch) for batch in batches] == list(range(20))
    assert all(isinstance(batch["x"], jax.Array) for batch in batches)
    assert not threads()
    assert next(feed, None) is None


@pytest.mark.parametrize("size", [1, 3])
def test_no_more_than_size_batches_are_made_ahead(size):
    is_made, ahead, taken = threading.Semaphore(0), [], 0

    def batches():
        for number, batch in enumerate(counting()):
            ahead.append(number + 1 - taken)
            is_made.release()
            yield batch

    with prefetch(batches(), size) as feed:
        assert all(is_made.acquire(timeout=60) for _ in range(size))
        for _ in range(5):
            taken += 1
            next(feed)
            assert is_made.acquire(timeout=60)
    assert max(ahead) == size


def test_any_iterable_and_any_tree():
    batches = [
        (np.ones((2, 2)), {"y": 3, "key": jax.random.key(0)}),
        (jnp.zeros((2, 2)), {"y": 4, "key": jax.random.key(1)}),
    ]
    (x, rest), (_, last) = prefetch(batches)
    assert x.shape == (2, 2)
    assert (int(rest["y"]), int(last["y"])) == (3, 4)
    assert last["key"].dtype == batches[1][1]["key"].dtype


def test_a_jax_array_is_passed_on_as_it_is():
    x = jnp.ones(3)
    assert next(iter(prefetch([x]))) is x


def test_one_buffer_can_be_filled_over_and_over():
    memory = np.zeros(4 * 1024 + 64, np.uint8)
    start = -memory.ctypes.data % 64  # so aligned, a CPU device takes host memory as its own
    buffer = memory[start : start + 4 * 1024].view(np.float32)

    def batches():
        for i in range(8):
            buffer[:] = i
            yield buffer

    assert [float(batch[0]) for batch in prefetch(batches(), 4)] == list(range(8))


def test_the_producers_exception_comes_after_its_batches_with_its_traceback():
    def failing():
        yield np.zeros(2)
        raise KeyError("shard-7")

    feed = prefetch(failing())
    next(feed)
    with pytest.raises(KeyError, match="shard-7") as caught:
        next(feed)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not threads()
    with pytest.raises(StopIteration):
        next(feed)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_leaves_no_thread(taken):
    feed = prefetch(counting())
    for _ in range(taken):
        next(feed)
    assert len(threads()) == 1
    feed.close()
    assert not threads()
    assert list(feed) == []
    feed.close()


def test_leaving_the_context_closes():
    with prefetch(counting()) as feed:
        next(feed)
        assert threads()
    assert not threads()


def test_dropping_the_feed_ends_its_thread():
    feed = prefetch(counting())
    next(feed)
    del feed
    gc.collect()
    assert not threads()


def test_an_abandoned_loop_ends_its_thread():
    for batch in prefetch(counting()):
        if first(batch) == 3:
            break
    gc.collect()
    assert not threads()


def test_closing_from_another_thread_frees_a_waiting_consumer():
    is_running, gate = threading.Event(), threading.Event()

    def stuck():
        is_running.set()
        gate.wait()
        yield np.zeros(1)

    feed, received = prefetch(stuck()), []
    consumer = threading.Thread(target=lambda: received.extend(feed))
    closer = threading.Thread(target=feed.close)
    consumer.start()
    is_running.wait()
    closer.start()
    gate.set()
    consumer.join()
    closer.join()
    assert len(received) <= 1


class Clock:
    """A clock that a test moves. It counts how often it was read."""

    def __init__(self):
        self.now_s, self.reads = 0.0, threading.Semaphore(0)

    def perf_counter(self):
        self.reads.release()
        return self.now_s


def test_waited_is_the_fraction_of_the_consumers_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sys.modules[prefetch.__module__], "time", clock)

    def slowly():
        for number, batch in enumerate(counting(10)):
            for _ in range(1 if number == 0 else 2):  # the consumer reads it before and after it waits
                clock.reads.acquire()
            clock.now_s += 1
            yield batch

    hungry = prefetch(slowly())
    assert hungry.waited == 0.0
    list(hungry)
    assert hungry.waited == 1.0
    fed = prefetch(counting(10))
    for _ in fed:
        clock.now_s += 1
    assert fed.waited == 0.0


def test_sharding():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = next(iter(prefetch([{"x": np.arange(8.0, dtype="f"), "y": jnp.arange(4)}], sharding=sharding)))
    assert batch["x"].sharding == sharding == batch["y"].sharding
    np.testing.assert_array_equal(batch["x"], np.arange(8))
    device = jax.devices("cpu")[2]
    assert next(iter(prefetch([np.ones(2)], sharding=device))).devices() == {device}


def test_the_thread_sees_the_callers_contexts():
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[1]):
        batch = next(iter(prefetch([np.ones(2)])))
    assert batch.dtype == np.float64
    assert batch.devices() == {jax.devices("cpu")[1]}


def test_errors():
    with pytest.raises(OptionError) as error:
        prefetch([], 0)
    assert str(error.value) == "prefetch needs size of at least 1, not 0."
    with pytest.raises(ArgumentError) as error:
        prefetch(counting)
    assert str(error.value) == "prefetch cannot iterate over batches: function.\n  try     call it: batches()"
    with pytest.raises(ArgumentError) as error:
        prefetch(3)
    assert str(error.value) == (
        "prefetch cannot iterate over batches: int.\n  try     a list, a generator or an iterator of batches"
    )
    with pytest.raises(DataError) as error:
        next(prefetch([{"x": np.ones(2), "name": ["cat", "dog"]}]))
    assert str(error.value) == (
        "batch['name'][0] has dtype <U3, and JAX has no such arrays.\n"
        "  try     make every leaf of a batch an array of numbers"
    )
