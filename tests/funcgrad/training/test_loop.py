"""train and step: the values of a loop written by hand, nothing lost, nothing compiled twice."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import re
import signal
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from funcgrad.transforms.core.errors import ArgumentError, DataError, NotFiniteError, NotScalarError, OptionError
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from funcgrad import step, train
from funcgrad.data.prefetch import prefetch
from funcgrad.training import loop
from funcgrad.training.log import Log
from funcgrad.training.program import _programs

from ... import checks
from ...checks import counted_compilations

assert_close = functools.partial(checks.assert_near, rtol=1e-5, atol=1e-7)
standard_promotion = pytest.mark.standard_promotion  # optax's Adam mixes dtypes


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def data(count, array=np.asarray):
    rng = np.random.default_rng(0)
    make = lambda *shape: array(rng.normal(size=shape).astype(np.float32))
    return [{"x": make(8, 3), "y": make(8)} for _ in range(count)]


def parameters():
    return {"w": jnp.ones(3), "b": jnp.zeros(())}


def mean(state, batch):
    """The simplest step: a running mean, and the batch's number for a metric."""
    return 0.9 * state + jnp.float32(0.1) * batch, {"loss": (state - batch) ** 2, "seen": batch}


def numbers(count):
    return [jnp.float32(i) for i in range(count)]


def by_hand(one, state, batches):
    run, rows = jax.jit(one), []
    for batch in batches:
        state, metrics = run(state, batch)
        rows.append(metrics)
    return state, jax.tree.map(lambda *rows: np.stack(rows), *rows)


@pytest.fixture
def compilations():
    """The compilations since the test began."""
    with counted_compilations() as events:
        yield events


@pytest.fixture
def eager_to_chunk(monkeypatch):
    """Chunks are tried however short the training, and taken whatever the clock says."""
    for name, value in {"CHUNKS_LEFT": 4, "COMPILES_LEFT": 0, "GAIN": 1e9, "SLOW_S": 1e9}.items():
        monkeypatch.setattr(loop, name, value)


# Values


@standard_promotion
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("chunk", ["auto", 4, 50])
def test_train_equals_a_loop_by_hand(chunk, array):
    optimizer = optax.adam(1e-2)

    def one(state, batch):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, opt_state), losses = by_hand(one, (parameters(), optimizer.init(parameters())), data(11, array))
    update = step(loss, optimizer)
    state, log = train(update, update.init(parameters()), data(11, array), steps=11, chunk=chunk)
    assert_close((state.params, state.opt_state), (params, opt_state))
    assert_close(log.metrics, {"loss": losses})
    assert (int(state.step), log.steps, log.ended) == (11, 11, "all steps done")


def test_one_step_at_a_time_is_bitwise_the_loop_by_hand():
    update = step(loss, optax.sgd(0.1))
    by_hand_state, metrics = by_hand(update, update.init(parameters()), data(9))
    state, log = train(update, update.init(parameters()), data(9), steps=9, chunk=1)
    assert_close(state, by_hand_state, rtol=0)
    assert_close(log.metrics, metrics, rtol=0)


def everything(state, batch):
    """State of many kinds: a key, an integer, booleans, a leaf that stays, and the same value twice."""
    key, use = jax.random.split(state["key"])
    x, flag = batch
    new = {
        "key": key,
        "n": state["n"] + jnp.int32(1),
        "flags": state["flags"] ^ flag,
        "same": state["same"],
        "twice": [state["twice"][0] + x.sum()] * 2,
        "half": (state["half"] * jnp.float16(0.5)).astype(jnp.float16),
    }
    return new, {"noise": jax.random.normal(use, (2,)), "nested": {"n": state["n"]}}


@pytest.mark.parametrize("chunk", [1, 3])
def test_state_of_any_dtype(chunk):
    make = lambda: {
        "key": jax.random.key(7),
        "n": jnp.int32(0),
        "flags": np.array([True, False]),
        "same": jnp.arange(3),
        "twice": [jnp.zeros(())] * 2,
        "half": jnp.ones(2, jnp.float16),
    }
    batches = [(np.full(2, i, np.float32), np.array([i % 2 == 0, True])) for i in range(8)]
    state, log = train(everything, make(), batches, steps=8, chunk=chunk)
    expected, metrics = by_hand(everything, make(), batches)
    assert_close(state, expected)
    assert_close(log.metrics, metrics)
    assert log.metrics["noise"].shape == (8, 2)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_host_buffer_filled_over_and_over(chunk):
    buffer = np.zeros((), np.float32)

    def batches():
        for i in range(8):
            buffer[...] = i
            yield buffer

    _, log = train(mean, jnp.float32(0), batches(), steps=8, chunk=chunk)
    np.testing.assert_array_equal(log.metrics["seen"], np.arange(8))


@pytest.mark.parametrize("chunk", [1, 4])
def test_weak_types_settle_at_the_start(chunk):
    traces = []

    def one(state, batch):
        traces.append(state)
        return {"w": state["w"] * state["rate"] + batch, "rate": state["rate"]}, {"w": state["w"]}

    state, log = train(one, {"w": 0.0, "rate": 0.5}, numbers(10), steps=10, chunk=chunk)
    assert log.metrics["w"][:3].tolist() == [0.0, 0.0, 1.0]
    assert state["rate"].weak_type
    assert len(traces) <= 4  # once with the weak type and once without, for each length


def test_64_bits():
    with jax.enable_x64(True):
        state, log = train(
            lambda s, b: (s + b, {"s": s}), jnp.float64(0), prefetch([np.float64(0.1)] * 5), steps=5, chunk=2
        )
        assert state.dtype == log.metrics["s"].dtype == np.float64


# The chunk


def test_a_short_training_compiles_one_program(compilations):
    train(mean, jnp.float32(0), numbers(1), steps=1)
    fresh = lambda state, batch: mean(state, batch)
    batches, state = numbers(50), jnp.float32(0)
    compilations.clear()
    _, log = train(fresh, state, batches, steps=50)
    assert len(compilations) == 1
    assert log.chunk == 1
    assert list(log.step_s) == [1]


def test_the_same_step_never_compiles_twice(compilations):
    fresh = lambda state, batch: mean(state, batch)
    batches, state = numbers(21), jnp.float32(0)
    train(mean, state, batches, steps=21, chunk=4)
    compilations.clear()
    _, log = train(fresh, state, batches, steps=21, chunk=4)
    assert len(compilations) == 2  # four at a time, and what is left
    assert log.compile_s > 0
    state, _ = train(fresh, state, batches, steps=21, chunk=4)
    train(fresh, state, batches, steps=13, chunk=4)
    assert len(compilations) == 2


def test_auto_tries_longer_chunks_on_real_steps(eager_to_chunk, compilations):
    fresh = lambda state, batch: mean(state, batch)
    batches, state = numbers(301), jnp.float32(0)
    train(mean, state, batches, steps=301)
    compilations.clear()
    state, log = train(fresh, state, batches, steps=301)
    assert log.chunk == 32
    assert list(log.step_s) == [1, 8, 32]
    assert len(compilations) == 3
    np.testing.assert_array_equal(log.metrics["seen"], np.arange(301))
    assert_close(state, by_hand(mean, jnp.float32(0), batches)[0])


def test_auto_stays_with_one_step_where_a_scan_is_slower(eager_to_chunk, monkeypatch):
    monkeypatch.setattr(loop, "GAIN", 0.0)
    _, log = train(mean, jnp.float32(0), numbers(301), steps=301)
    assert log.chunk == 1
    assert list(log.step_s) == [1, 8]


@pytest.mark.parametrize(
    ("name", "value"), [("SLOW_S", 0.0), ("CHUNK_BYTES", 7), ("COMPILES_LEFT", 1e9), ("CHUNKS_LEFT", 1e9)]
)
def test_auto_does_not_try_what_cannot_pay(eager_to_chunk, monkeypatch, name, value):
    monkeypatch.setattr(loop, name, value)
    _, log = train(mean, jnp.float32(0), numbers(100), steps=100)
    assert list(log.step_s) == [1]


@pytest.mark.parametrize("chunk", ["auto", 1, 4])
@pytest.mark.parametrize("count", [1, 3, 8, 30, 70])
def test_early_end_at_any_place(count, chunk, eager_to_chunk):
    _, log = train(mean, jnp.float32(0), iter(numbers(count)), steps=1000, chunk=chunk)
    assert (log.steps, log.ended) == (count, f"the batches ended after {count} of 1000 steps")
    np.testing.assert_array_equal(log.metrics["seen"], np.arange(count))


@pytest.mark.parametrize("chunk", ["auto", 1, 4])
def test_an_iterator_goes_on_where_the_training_stopped(chunk):
    source = iter(numbers(100))
    state, log = train(mean, jnp.float32(0), source, steps=13, chunk=chunk)
    _, more = train(mean, state, source, steps=20, chunk=chunk)
    assert [*log.metrics["seen"], *more.metrics["seen"]] == list(range(33))
    assert next(source) == 33


# The caller's arrays, and memory


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_callers_state_stays_valid(chunk):
    shared, host = jnp.ones(3), np.zeros(3, np.float32)
    state = {"a": shared, "b": shared, "host": host}
    one = lambda state, batch: (jax.tree.map(lambda leaf: leaf + batch, state), {})
    out, log = train(one, state, numbers(10), steps=10, chunk=chunk)
    assert not shared.is_deleted()
    assert shared.tolist() == [1, 1, 1]
    assert host.tolist() == [0, 0, 0]
    assert out["a"].tolist() == [46, 46, 46]
    assert log.metrics == {}


def test_the_state_is_donated_and_the_batches_are_let_go():
    live = []

    def batches():
        for i in range(400):
            if i >= 200:
                live.append(len(jax.live_arrays()))
            yield np.full(1000, i, np.float32)

    kept = []
    one = lambda state, batch: (state + batch, {"loss": batch.sum()})
    train(one, jnp.zeros(1000), batches(), steps=400, chunk=4, hooks=[lambda n, state, metrics: kept.append(state)])
    assert all(state.is_deleted() for state in kept[:-1])
    kept.clear()
    assert max(live) - min(live) <= 2 * 4 + 2


def test_a_step_is_not_kept_alive():
    def make():
        table = jnp.arange(3.0)
        return lambda state, batch: (state + table.sum() * batch, {})

    one = make()
    train(one, jnp.float32(0), numbers(3), steps=3)
    dead = weakref.ref(one)
    assert one in _programs
    del one
    gc.collect()
    assert dead() is None


class Model:
    """A callable with no hash, and a method, for steps."""

    __hash__ = None

    def __call__(self, state, batch):
        return mean(state, batch)


@dataclasses.dataclass(frozen=True)
class Slotted:
    """A callable without weak references."""

    __slots__ = ("rate",)
    rate: float

    def __call__(self, state, batch):
        return mean(state, batch)


@pytest.mark.parametrize(
    "one",
    [Model(), Model().__call__, Slotted(0.1), functools.partial(mean), jax.jit(mean), jax.jit(mean, donate_argnums=0)],
    ids=["unhashable", "method", "slots", "partial", "jit", "donating jit"],
)
@pytest.mark.parametrize("chunk", [1, 4])
def test_any_callable_is_a_step(one, chunk):
    state, _ = train(one, jnp.float32(0), numbers(6), steps=6, chunk=chunk)
    assert_close(state, by_hand(mean, jnp.float32(0), numbers(6))[0])


def test_train_works_where_jit_is_disabled():
    with jax.disable_jit():
        state, _ = train(mean, jnp.float32(0), numbers(6), steps=6, chunk=4)
    assert_close(state, by_hand(mean, jnp.float32(0), numbers(6))[0])


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("axis", [AxisType.Explicit, AxisType.Auto])
def test_sharded_batches(chunk, axis, compilations):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis,), devices=jax.devices("cpu")[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    update = step(loss, optax.sgd(0.1))
    expected, _ = train(update, update.init(parameters()), data(10), steps=10)
    update = step(loss, optax.sgd(0.1))
    state, _ = train(update, update.init(parameters()), prefetch(data(10), sharding=sharding), steps=10, chunk=chunk)
    assert_close(state, expected)
    assert state.params["w"].sharding == NamedSharding(mesh, PartitionSpec())
    compilations.clear()
    state, _ = train(update, state, prefetch(data(10), sharding=sharding), steps=10, chunk=chunk)
    assert not compilations


def test_a_batch_on_another_device_takes_the_state_there():
    device = jax.devices("cpu")[2]
    state, _ = train(mean, jnp.float32(0), prefetch(numbers(6), sharding=device), steps=6, chunk=4)
    assert state.devices() == {device}


# step


@pytest.mark.parametrize("chunk", [1, 4])
def test_key_and_model_state(chunk):
    def noisy(params, batch, *, key, model_state):
        x = batch["x"] + jax.random.normal(key, batch["x"].shape)
        model_state = {"mean": 0.9 * model_state["mean"] + jnp.float32(0.1) * x.mean(0)}
        value = loss(params, {"x": x - model_state["mean"], "y": batch["y"]})
        return value, (model_state, {"largest": jnp.abs(x).max()})

    update, key = step(noisy, optax.sgd(0.1), has_aux=True), jax.random.key(3)
    start = update.init(parameters(), key=key, model_state={"mean": jnp.zeros(3)})
    state, log = train(update, start, data(7), steps=7, chunk=chunk)

    params, model_state, losses = parameters(), {"mean": jnp.zeros(3)}, []
    for i, batch in enumerate(data(7)):
        slope = jax.value_and_grad(noisy, has_aux=True)
        out, grads = slope(params, batch, key=jax.random.fold_in(key, i), model_state=model_state)
        params = jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, grads)
        model_state = out[1][0]
        losses.append(out[0])
    assert_close((state.params, state.model_state), (params, model_state))
    assert_close(log.metrics["loss"], np.array(losses))
    assert set(log.metrics) == {"loss", "largest"}
    assert (state.key == key).all()


def test_every_form_of_loss():
    x = {"x": jnp.ones((8, 3)), "y": jnp.zeros(8)}
    sgd, key, s = optax.sgd(0.1), jax.random.key(0), jnp.zeros(2)
    plain = lambda params, batch: loss(params, batch)
    aux = lambda params, batch: (loss(params, batch), {"one": 1})
    keyed = lambda params, batch, key: loss(params, batch) + jax.random.normal(key)
    stateful = lambda params, batch, model_state: (loss(params, batch), model_state + 1)
    for f, options, has_aux in (
        (plain, {}, False),
        (aux, {}, True),
        (keyed, {"key": key}, False),
        (stateful, {"model_state": s}, False),
    ):
        update = step(f, sgd, has_aux=has_aux)
        state, log = train(update, update.init(parameters(), **options), [x] * 3, steps=3)
        assert int(state.step) == 3
        assert set(log.metrics) == ({"loss", "one"} if has_aux else {"loss"})
        assert state.model_state is None or state.model_state.tolist() == [3, 3]


def test_training_in_two_parts_is_training_at_once():
    update = step(lambda p, x, key: loss(p, x) + p["b"] * jax.random.normal(key), optax.sgd(0.1, momentum=0.9))
    start = update.init(parameters(), key=jax.random.key(1))
    whole, _ = train(update, start, data(11), steps=11, chunk=1)
    half, _ = train(update, start, data(11)[:6], steps=6, chunk=1)
    rest, _ = train(update, half, data(11)[6:], steps=5, chunk=1)
    assert_close(rest, whole, rtol=0)


def test_update_is_pure_and_composes():
    update = step(loss, optax.sgd(0.1))
    state, batch = update.init(parameters()), data(1)[0]
    plain, jitted = update(state, batch), jax.jit(update)(state, batch)
    assert_close(plain, jitted)
    mapped = jax.vmap(update, in_axes=(None, 0))(state, jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), batch))
    assert mapped[1]["loss"].shape == (2,)


def test_step_errors():
    with pytest.raises(OptionError) as error:
        step(loss, optax.adam)
    assert str(error.value) == (
        "step needs an optimizer with init and update, not adam.\n  try     make one, as in optax.adam(1e-3)"
    )
    with pytest.raises(OptionError, match="memory= cannot be 'abc'"):
        step(lambda params, x: x * params, optax.sgd(0.1), memory="abc")
    update = step(lambda params, x: x * params, optax.sgd(0.1))
    with pytest.raises(NotScalarError):
        train(update, update.init(jnp.ones(3)), [jnp.ones(3)], steps=1)
    update = step(lambda params, x: (x * params, x), optax.sgd(0.1), has_aux=True)
    with pytest.raises(ArgumentError, match="step with has_aux=True needs a loss that returns a dict of metrics, not "):
        train(update, update.init(jnp.float32(1)), numbers(1), steps=1)


# Hooks, the log, the bar


@pytest.mark.parametrize(("chunk", "calls"), [(1, list(range(1, 11))), (4, [4, 8, 9, 10])])
def test_hooks_see_each_dispatch(chunk, calls):
    seen, copies = [], []

    def hook(number, state, metrics):
        seen.append((number, metrics["seen"].tolist()))
        copies.append((jnp.copy(state), np.asarray(state)))

    state, log = train(mean, jnp.float32(0), numbers(10), steps=10, chunk=chunk, hooks=[hook])
    assert [number for number, _ in seen] == calls
    assert list(itertools.chain(*(values for _, values in seen))) == list(range(10))
    for number, (copy, view) in zip(calls, copies, strict=True):
        expected = by_hand(mean, jnp.float32(0), numbers(number))[0]
        assert_close((copy, view), (expected, np.asarray(expected)))
    assert copies[-1][0] == state
    assert log.ended == "all steps done"


def test_a_hook_ends_the_training():
    calls = []
    hooks = (lambda n, state, metrics: metrics["seen"][-1] >= 9, lambda n, state, metrics: calls.append(n))
    state, log = train(mean, jnp.float32(0), numbers(100), steps=100, chunk=4, hooks=hooks)
    assert calls == [4, 8, 12]
    assert (log.steps, log.ended) == (12, "a hook ended it after 12 of 100 steps")
    assert_close(state, by_hand(mean, jnp.float32(0), numbers(12))[0])


def test_what_a_hook_raises_carries_state_and_log():
    def hook(number, state, metrics):
        if number == 6:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine") as error:
        train(mean, jnp.float32(0), numbers(100), steps=100, chunk=3, hooks=[hook])
    assert_close(error.value.state, by_hand(mean, jnp.float32(0), numbers(6))[0])
    assert error.value.log.metrics["seen"].tolist() == list(range(6))


def test_the_log_in_words():
    log = Log(
        steps=2000,
        chunk=8,
        metrics={"loss": np.array([2.5, 0.125]), "pair": np.zeros((2, 2))},
        elapsed_s=12.5,
        compile_s=2.5,
        waited=0.031,
        step_s={1: 0.0052, 8: 0.00487},
        ended="all steps done",
    )
    assert str(log) == (
        "2,000 steps in 12.5 s, 2.5 s of it compiling\n"
        "  speed  200 steps/s; 3.1% of the time waiting for batches\n"
        "  chunk  8; a step took, by chunk, 1: 5.2 ms, 8: 4.87 ms\n"
        "  loss   2.5 → 0.125\n"
        "  ended  all steps done"
    )
    assert log._repr_html_().startswith("<div>2,000 steps")


class Clock:
    """A clock that a test moves, and each reading by a millisecond."""

    now_s = 0.0

    def perf_counter(self):
        self.now_s += 0.001
        return self.now_s

    def wait(self, *_):
        self.now_s += 1


def test_the_log_measures(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)

    def slowly():
        for batch in numbers(10):
            clock.wait()
            yield batch

    fresh = lambda state, batch: mean(state, batch)
    _, log = train(fresh, jnp.float32(0), slowly(), steps=10, chunk=1, progress=False)
    assert log.waited > 0.9
    assert 0 < log.compile_s < log.elapsed_s
    assert log.steps_per_s == pytest.approx(10 / (log.elapsed_s - log.compile_s))
    _, log = train(mean, jnp.float32(0), numbers(10), steps=10, chunk=1, hooks=[clock.wait], progress=False)
    assert log.waited < 0.1


@pytest.mark.parametrize("progress", [True, False])
def test_nothing_is_printed_without_a_terminal(capsys, progress):
    train(mean, jnp.float32(0), numbers(3), steps=3, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_loss_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    before = threading.active_count()
    during = []
    train(mean, jnp.float32(0), numbers(3), steps=3, hooks=[lambda *_: during.append(threading.active_count())])
    out, err = capsys.readouterr()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)
    assert out == ""
    assert re.search(r"3/3 loss 3.61  [\d.e+]+ steps/s 0:00:00", text)
    assert max(during) == before
    train(mean, jnp.float32(0), numbers(3), steps=3, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("loss", "options", "given", "expected"),
    [
        (
            lambda params, batch: params,
            {},
            {"key": 0, "model_state": 0},
            "init was given key, model_state, and <lambda> does not take it by keyword.\n"
            "  at      (<lambda>)\n"
            "  try     def <lambda>(params, batch, *, key, model_state), or leave key, model_state out of init",
        ),
        (
            lambda params, batch, key: params,
            {},
            {"key": 0, "model_state": 0},
            "init was given model_state, and <lambda> does not take it by keyword.\n"
            "  at      (<lambda>)\n"
            "  try     def <lambda>(params, batch, *, key, model_state), or leave model_state out of init",
        ),
        (
            lambda params, batch: (params, {}),
            {},
            {},
            "step needs <lambda> to return a scalar, but it returned (float32[], dict).\n"
            "  at      (<lambda>)\n"
            "  try     fg.step(..., has_aux=True), where it returns metrics too",
        ),
        (
            lambda params, batch, model_state: params,
            {},
            {"model_state": 0},
            "step needs <lambda> to return scalar, model_state, but it returned float32[].\n"
            "  at      (<lambda>)\n"
            "  try     return scalar, model_state",
        ),
        (
            lambda params, batch, **given: (params, {}),
            {"has_aux": True},
            {"model_state": 0},
            'step needs <lambda> to return scalar, (model_state, {"accuracy": accuracy}), '
            "but it returned (float32[], dict).\n"
            "  at      (<lambda>)\n"
            '  try     return scalar, (model_state, {"accuracy": accuracy})',
        ),
    ],
    ids=["takes neither", "takes one", "metrics unasked", "no model_state", "no pair in the pair"],
)
def test_a_loss_that_does_not_fit_init(loss, options, given, expected):
    update = step(loss, optax.sgd(0.1), **options)
    given = {name: jax.random.key(value) if name == "key" else jnp.float32(value) for name, value in given.items()}
    error = failing(update, update.init(jnp.float32(1), **given), numbers(1), steps=1)
    assert isinstance(error, NotScalarError if expected.endswith("metrics too") else ArgumentError)
    assert message(error) == expected


def test_params_in_place_of_the_state():
    error = failing(step(loss, optax.sgd(0.1)), parameters(), data(1), steps=1)
    assert isinstance(error, ArgumentError)
    assert message(error) == (
        "an update needs the TrainState that its init returned, and got dict.\n  try     pass update.init(params)"
    )


@pytest.mark.parametrize(("leaf", "dtype"), [(jnp.int32(3), "int32"), (np.arange(3), "int64"), (3, "int64")])
def test_integer_params(leaf, dtype):
    with pytest.raises(ArgumentError) as error:
        step(loss, optax.sgd(0.1)).init({"w": jnp.ones(3), "n": leaf})
    assert str(error.value) == (
        f"step differentiates by floats, and params['n'] holds {dtype}.\n"
        "  try     keep integers in model_state or in the batch"
    )


# What goes wrong


def failing(*args, **options):
    with pytest.raises(Exception) as error:  # noqa: PT011
        train(*args, **options)
    return error.value


def message(error):
    """Without the line of the file, which every edit moves."""
    return re.sub(r"at      .*\((.*)\)", r"at      (\1)", str(error))


@pytest.mark.parametrize("chunk", ["auto", 1, 8])
def test_a_batch_with_nan_is_found(chunk):
    batches = data(100)
    batches[50]["x"][1, :2], batches[50]["x"][0, 0] = np.nan, np.inf
    update = step(loss, optax.sgd(0.1))
    error = failing(update, update.init(parameters()), batches, steps=100, chunk=chunk)
    assert isinstance(error, NotFiniteError)
    assert isinstance(error, FloatingPointError)
    assert message(error) == (
        "train got a loss of nan at step 50.\n"
        "  at      (loss)\n"
        "  inputs  batch['x'] has 2 NaN of 24, batch['x'] has 1 infinite of 24\n"
        "  try     repair the batch: it holds values that are not finite"
    )
    assert np.isfinite(error.log.metrics["loss"][:50]).all()
    assert np.isnan(error.log.metrics["loss"][50])
    assert int(error.state.step) == error.log.steps == len(error.log.metrics["loss"])
    assert error.log.ended == "NotFiniteError"


def test_a_loss_that_explodes():
    update = step(loss, optax.sgd(1e9))
    error = failing(update, update.init(parameters()), data(100), steps=100, chunk=1)
    assert re.fullmatch(r"train got a loss of (inf|nan) at step \d.", message(error).splitlines()[0])
    assert message(error).splitlines()[1:] == [
        "  at      (loss)",
        "  inputs  the batch is finite",
        "  try     a smaller learning rate, clipped gradients, or fg.nan_origin(step, state, batch) of the state before it",
    ]


def test_a_hook_sees_no_state_after_a_loss_that_is_not_finite():
    seen = []
    batches = [jnp.float32(i if i != 5 else np.nan) for i in range(10)]
    hook = lambda n, state, metrics: seen.append(float(state))
    assert isinstance(failing(mean, jnp.float32(0), batches, steps=10, chunk=1, hooks=[hook]), NotFiniteError)
    assert len(seen) == 5
    assert np.isfinite(seen).all()


def test_only_the_loss_must_be_finite():
    _, log = train(lambda s, b: (s, {"ratio": b / jnp.float32(0)}), jnp.float32(0), numbers(3), steps=3)
    assert np.isnan(log.metrics["ratio"][0])


@pytest.mark.parametrize("chunk", ["auto", 1, 4])
def test_no_batches(chunk):
    error = failing(mean, jnp.float32(0), iter([]), steps=3, chunk=chunk)
    assert isinstance(error, DataError)
    assert message(error) == (
        "train got no batch: the batches ended before the first step.\n"
        "  try     an iterator can be consumed only once: pass a list, or create the iterator again"
    )


@pytest.mark.parametrize("chunk", ["auto", 1, 4])
def test_a_batch_of_another_shape(chunk):
    batches = data(10)
    batches[6] = jax.tree.map(lambda leaf: leaf[:5], batches[6])
    update = step(loss, optax.sgd(0.1))
    error = failing(update, update.init(parameters()), batches, steps=10, chunk=chunk)
    assert isinstance(error, DataError)
    assert message(error) == (
        "train needs batches of one tree, shapes and dtypes, but batch 6 is not like the first.\n"
        "  inputs  batch['x'] float32[8,3] → float32[5,3], batch['y'] float32[8] → float32[5]\n"
        "  try     pad or drop what does not fill a batch"
    )
    assert int(error.state.step) == error.log.steps == 6
    assert_close(error.state, by_hand(update, update.init(parameters()), data(6))[0])


@pytest.mark.parametrize(
    ("last", "found"),
    [
        ({"x": np.ones(2, "f")}, "batch['y'] float32[2] → absent"),
        ({"x": np.ones(2, "f"), "y": np.ones(2, np.int32)}, "batch['y'] float32[2] → int32[2]"),
        (
            [np.ones(2, "f")],
            "batch['x'] float32[2] → absent, batch['y'] float32[2] → absent, batch[0] absent → float32[2]",
        ),
    ],
)
def test_a_batch_of_another_tree_or_dtype(last, found):
    batches = [{"x": np.ones(2, "f"), "y": np.ones(2, "f")}, last]
    error = failing(lambda state, batch: (state, {}), jnp.float32(0), batches, steps=2)
    assert message(error).splitlines()[1] == f"  inputs  {found}"


@pytest.mark.parametrize("wrap", [iter, prefetch], ids=["plain", "prefetched"])
@pytest.mark.parametrize("chunk", ["auto", 1, 4])
def test_a_producer_that_raises(chunk, wrap):
    def batches():
        yield from numbers(6)
        raise OSError("disk gone")

    error = failing(mean, jnp.float32(0), wrap(batches()), steps=10, chunk=chunk)
    assert type(error) is OSError
    assert error.__notes__ == ["steps done: 6. `.state` on this exception holds them, `.log` the metrics"]
    assert_close(error.state, by_hand(mean, jnp.float32(0), numbers(6))[0])
    assert error.log.metrics["seen"].tolist() == list(range(6))


@pytest.fixture
def interruptible():
    """As in a terminal: what a shell runs in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_keyboard_interrupt_that_garbage_collection_swallows():
    """JAX has a callback there, and what a callback raises goes nowhere."""

    def collected(phase, info):
        if phase == "start" and taken == [50]:
            taken.append(51)
            signal.raise_signal(signal.SIGINT)

    def batches():
        for number, batch in enumerate(itertools.cycle(numbers(7))):
            if number == 50:
                taken.append(50)
                gc.collect()
            yield batch

    taken = []
    gc.callbacks.append(collected)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(mean, jnp.float32(0), batches(), steps=2000, chunk=1)
    finally:
        gc.callbacks.remove(collected)
    assert taken == [50, 51]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("chunk", ["auto", 1, 4])
def test_a_keyboard_interrupt_loses_nothing(chunk):
    running, signalled = threading.Event(), threading.Event()

    def batches():
        for number, batch in enumerate(itertools.cycle(numbers(7))):
            if number == 50:
                running.set()
            yield batch

    def interrupt():
        running.wait()  # a compilation takes as long as it takes
        signalled.set()
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    gc.disable()  # what is raised while garbage is collected is the test above
    try:
        with pytest.raises(KeyboardInterrupt) as error:
            train(mean, jnp.float32(0), batches(), steps=10**9, chunk=chunk)
    finally:
        gc.enable()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    log, seen = error.value.log, error.value.log.metrics["seen"]
    assert signalled.is_set()
    assert (log.steps, log.ended) == (len(seen), "KeyboardInterrupt")
    assert_close(error.value.state, by_hand(mean, jnp.float32(0), [jnp.float32(x) for x in seen[-300:]])[0])


@pytest.mark.usefixtures("interruptible")
def test_a_keyboard_interrupt_waits_for_the_dispatch(monkeypatch):
    """Ctrl-C between the donation and the assignment of the new state."""
    program_of = loop.program_of

    def interrupting(one, state):
        program = program_of(one, state)

        class Run:
            trace, lower, calls = program.run.trace, program.run.lower, 0

            def __call__(self, state, batches):
                out = program.run(state, batches)
                self.calls += 1
                if self.calls == 3:
                    signal.raise_signal(signal.SIGINT)
                return out

        return dataclasses.replace(program, run=Run())

    monkeypatch.setattr(loop, "program_of", interrupting)
    with pytest.raises(KeyboardInterrupt) as error:
        train(mean, jnp.float32(0), numbers(10), steps=10, chunk=2)
    assert error.value.log.steps == 6
    assert_close(error.value.state, by_hand(mean, jnp.float32(0), numbers(6))[0])


def test_train_in_another_thread():
    out = []
    thread = threading.Thread(target=lambda: out.append(train(mean, jnp.float32(0), numbers(6), steps=6)))
    thread.start()
    thread.join()
    assert out[0][1].steps == 6


def test_a_step_that_changes_its_state():
    def one(state, batch):
        return {"w": state["w"].astype(jnp.float16), "n": state["n"], "new": batch}, {}

    for chunk in (1, 4):
        error = failing(one, {"w": jnp.ones(3), "n": 0, "old": 1.0}, numbers(4), steps=4, chunk=chunk)
        assert isinstance(error, ArgumentError)
        assert message(error) == (
            "train needs a step that returns its state with the tree, shapes and dtypes that it got.\n"
            "  at      (one)\n"
            "  inputs  state['old'] float32[] → absent, state['w'] float32[3] → float16[3], "
            "state['new'] absent → float32[]\n"
            "  try     cast what changed back, as in new.astype(old.dtype)"
        )
        assert error.state["w"].tolist() == [1, 1, 1]
    error = failing(lambda s, b: (tuple(s), {}), [jnp.float32(0)], numbers(4), steps=4)
    assert message(error).splitlines()[2] == "  inputs  state PyTreeDef([*]) → PyTreeDef((*,))"


@pytest.mark.parametrize(
    ("out", "kinds"),
    [
        (lambda s, b: s, "float32[]"),
        (lambda s, b: (s, b), "float32[], float32[]"),
        (lambda s, b: (s, {}, b), "float32[], dict, float32[]"),
        (lambda s, b: None, "NoneType"),
    ],
)
def test_a_step_that_returns_something_else(out, kinds):
    error = failing(out, jnp.float32(0), numbers(4), steps=4)
    assert isinstance(error, ArgumentError)
    assert message(error) == (
        f"train needs a step that returns (state, metrics), metrics a dict of arrays, but it returned {kinds}.\n"
        "  at      (<lambda>)\n"
        '  try     return state, {"loss": loss}'
    )


def test_bad_arguments():
    zero = jnp.float32(0)
    assert message(failing(mean, {"f": print}, numbers(1), steps=1)) == (
        "train needs a state of arrays, but state['f'] is of type builtin_function_or_method.\n"
        "  try     close over it in the step"
    )
    assert message(failing(mean, zero, lambda: numbers(1), steps=1)) == (
        "train cannot iterate over batches: function.\n  try     call it: batches()"
    )
    for batch in ({"x": np.ones(3)}, (np.ones(3), np.ones(3)), np.ones(3)):
        assert message(failing(mean, zero, batch, steps=1)) == (
            f"train needs an iterable of batches, and got one batch: {type(batch).__name__}.\n"
            "  try     [batch] * steps, or a generator of batches"
        )
    assert message(failing(mean, zero, numbers(1), steps=0)) == "train needs steps of at least 1, not 0."
    for chunk in (0, "all"):
        error = failing(mean, zero, numbers(1), steps=1, chunk=chunk)
        assert isinstance(error, OptionError)
        assert message(error) == f'train needs a chunk of at least 1, or "auto", not {chunk!r}.'
    assert message(failing(mean, zero, numbers(1), steps=1, hooks=print)) == (
        "train needs hooks to be a tuple of functions.\n  try     hooks=(hook,)"
    )
