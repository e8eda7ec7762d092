"""`jit` behaves as `jax.jit`, row by row, and says of every retrace what changed."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import threading
import traceback
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.compilation.jit import jit
from funcgrad.transforms.compilation.retraces import Change, Retraces
from funcgrad.transforms.core.errors import FuncgradError, RetraceError
from jax.sharding import NamedSharding, PartitionSpec

X = np.arange(3, dtype=np.float32)


def affine(params, x, scale=2.0):
    return params["w"] * x + scale * params["b"]


def params_of(n=3):
    return {"w": jnp.ones(n), "b": jnp.zeros(n)}


def told(f, index=-1):
    """The changes of one entry, as (kind, where, before, now)."""
    return [(c.kind, c.where, c.before, c.now) for c in f.retraces[index].changes]


# ------------------------------------------------------------------------------------------------ jax.jit, row by row


class Model:
    def __init__(self, scale):
        self.scale = scale

    def apply(self, x):
        return self.scale * x

    def __call__(self, x):
        return self.scale + x


class Unhashable(Model):
    __hash__ = None


def power(x, n):
    return x**n


def rest(x, *more, **named):
    return x, more, named


def branches(x):
    return x if x[0] > 0 else -x


def donated(jit):
    x = jnp.ones(8)
    result = jit(lambda x: x + 1, donate_argnums=0)(x)
    return x.is_deleted(), result


class Wrapped:
    def __jax_array__(self):
        return jnp.asarray(X)


def method(jit):
    class Layer(Model):
        @functools.partial(jit, static_argnums=0)
        def scaled(self, x):
            return self.scale * x

        @jit
        def plain(self):
            return None

    layer = Layer(3.0)
    return layer.scaled(X), layer.scaled(x=X), Layer.scaled(layer, X), inspect.ismethod(layer.scaled)


def sharded(jit):
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    result = jit(lambda x: x + 1, in_shardings=sharding, out_shardings=sharding)(jnp.ones(4))
    return str(result.sharding), result


def disabled(jit):
    seen = []
    with jax.disable_jit():
        jit(lambda x: seen.append(float(x)))(2.0)
    return seen


def leaking(jit):
    kept = []
    with jax.checking_leaks():
        return jit(lambda x: kept.append(x) or 1)(1.0)


def cached(jit):
    traces = []

    def f(x):
        traces.append(None)
        return x

    jit(f)(X), jit(f)(X), jax.jit(f)(X), jit(jit(f))(X)
    return len(traces)


def effects(jit):
    seen = []
    f = jit(lambda x: jax.debug.callback(lambda v: seen.append(float(v)), x))
    for _ in range(3):
        f(1.0)
    jax.effects_barrier()
    return seen


def state(jit):
    ref = jax.new_ref(jnp.zeros(()))

    def add(x):
        ref[...] += x

    f = jit(add)
    f(1.0), f(2.0)
    return ref[...]


def staged(jit):
    f = jit(power, static_argnums=1)
    spec = jax.ShapeDtypeStruct((3,), "float32")
    lowered = f.lower(spec, 2)
    return (
        lowered.as_text(),
        lowered.compile()(X),
        str(f.trace(spec, n=2).jaxpr),
        f.eval_shape(spec, 2),
        type(f.lower(spec, n=3).compile().cost_analysis()),
    )


def cleared(jit):
    traces = []
    f = jit(lambda x: traces.append(None))
    f(1.0), f.clear_cache(), f(1.0), jax.clear_caches(), f(1.0)
    return len(traces), f._cache_size()


def described(jit):
    f = jit(affine, static_argnames="scale")
    return (
        f.__name__,
        f.__qualname__,
        f.__module__,
        f.__doc__,
        f.__wrapped__,
        str(inspect.signature(f)),
        repr(f),
        callable(f),
    )


def cloudpickled(jit):
    cloudpickle = pytest.importorskip("cloudpickle")
    f = cloudpickle.loads(cloudpickle.dumps(jit(lambda x: x + 1)))
    return f(X), hasattr(f, "lower"), copy.deepcopy(jit(power, static_argnums=1))(X, 2), copy.copy(jit(rest))(X)


def pickled(jit):
    import pickle

    return pickle.dumps(jit(power))


def threads(jit):
    f, results = jit(affine), []
    run = lambda n: results.append((n, float(f(params_of(n), np.ones(n, "float32")).sum())))
    workers = [threading.Thread(target=run, args=(n,)) for n in (3, 3, 4, 5)]
    [w.start() for w in workers], [w.join() for w in workers]
    return sorted(results)


def identity(jit):
    f = jit(power)
    return f == jit(power), {f: 1}[f], type(f).__name__, weakref.ref(f)() is f


ROWS = {
    "values": lambda jit: jit(affine)(params_of(), X),
    "keyword": lambda jit: jit(affine)(params_of(), x=X, scale=3),
    "tree": lambda jit: jit(rest)(1, X, [X, None], a=(), b={"c": 2.0}),
    "static_argnums": lambda jit: jit(power, static_argnums=1)(X, 3),
    "static_argnums negative": lambda jit: jit(power, static_argnums=-1)(X, 3),
    "static_argnames": lambda jit: (jit(power, static_argnames="n")(X, 3), jit(power, static_argnames=["n"])(X, n=3)),
    "static unhashable": lambda jit: jit(power, static_argnums=1)(X, [3]),
    "static missing": lambda jit: jit(power, static_argnums=1)(X),
    "static out of range": lambda jit: jit(power, static_argnums=5),
    "static unknown name": lambda jit: jit(power, static_argnames="m"),
    "too many arguments": lambda jit: jit(power)(X, 2, 3),
    "unknown keyword": lambda jit: jit(power)(X, m=3),
    "not an array": lambda jit: jit(power)("a", 3),
    "not an array, nested": lambda jit: jax.vmap(lambda x: jit(power)(x, "a"))(X),
    "array protocol": lambda jit: jit(lambda x: x + 1)(Wrapped()),
    "overflow": lambda jit: jit(lambda x: x)(2**80),
    "mixed keys": lambda jit: jit(lambda d: 0)({1: 2, "a": 3}),
    "not callable": lambda jit: jit(3),
    "unknown option": lambda jit: jit(power, statics=1),
    "two positional": lambda jit: jit(power, 1),
    "branch on a tracer": lambda jit: jit(branches)(X),
    "float of a tracer": lambda jit: jit(float)(X[0]),
    "inside raises": lambda jit: jit(lambda x: {}[1])(X),
    "decorator": lambda jit: jit(static_argnums=1)(power)(X, 2),
    "bound method": lambda jit: jit(Model(2.0).apply)(X),
    "partial": lambda jit: jit(functools.partial(power, n=2))(X),
    "callable object": lambda jit: jit(Model(2.0))(X),
    "unhashable callable": lambda jit: jit(Unhashable(2.0))(X),
    "builtin": lambda jit: jit(abs)(X),
    "numpy function": lambda jit: jit(jnp.sin)(X),
    "jit of jit": lambda jit: jit(jit(affine))(params_of(), X),
    "under grad": lambda jit: jax.grad(lambda x: jit(power, static_argnums=1)(x, 3))(2.0),
    "grad inside": lambda jit: jit(jax.grad(lambda x: x**3))(2.0),
    "second order": lambda jit: jax.hessian(lambda x: jit(jnp.sum)(x**3))(X),
    "under vmap": lambda jit: jax.vmap(jit(affine), in_axes=(None, 0))(params_of(), np.ones((5, 3), "float32")),
    "vmap inside, named axis": lambda jit: jax.vmap(jit(lambda x: jax.lax.psum(x, "i")), axis_name="i")(X),
    "under jit": lambda jit: jit(lambda x: jit(power, static_argnums=1)(x, 2) + jit(jnp.sin)(x))(X),
    "in scan": lambda jit: jax.lax.scan(lambda c, x: (jit(jnp.add)(c, x), c), np.float32(0), X),
    "under eval_shape": lambda jit: jax.eval_shape(jit(affine), params_of(), X),
    "under make_jaxpr": lambda jit: str(jax.make_jaxpr(jit(affine))(params_of(), X)),
    "remat": lambda jit: jax.grad(lambda x: jax.checkpoint(jit(jnp.sin))(x))(1.0),
    "keys": lambda jit: jax.random.key_data(jit(lambda k: jax.random.split(k))(jax.random.key(0))),
    "donation": donated,
    "method": method,
    "shardings": sharded,
    "disable_jit": disabled,
    "checking_leaks": leaking,
    "shared caches": cached,
    "effects": effects,
    "state": state,
    "staged": staged,
    "clear_cache": cleared,
    "described": described,
    "cloudpickle": cloudpickled,
    "pickle": pickled,
    "threads": threads,
    "identity": identity,
}


def outcome(row, jit):
    try:
        result = row(jit)
    except Exception as e:
        return type(e), None
    return None, jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, result)


@pytest.mark.filterwarnings("ignore:.*donated buffers were not usable")
@pytest.mark.parametrize("name", ROWS)
def test_behaves_as_jax_jit(name):
    expected, actual = outcome(ROWS[name], jax.jit), outcome(ROWS[name], jit)
    assert actual[0] == expected[0]
    assert jax.tree.structure(actual[1]) == jax.tree.structure(expected[1])
    jax.tree.map(np.testing.assert_array_equal, actual[1], expected[1])


def test_hits_and_misses_are_those_of_jax():
    f, g = (make(lambda x, n: x**n, static_argnums=1) for make in (jit, jax.jit))
    for x, n in [(X, 2), (X, 2), (jnp.asarray(X), 2), (X, 3), (2.0, 2), (X, 2)]:
        f(x, n), g(x, n)
    assert f._cache_size() == g._cache_size() == 4


def test_errors_of_jax_are_not_rewritten():
    with pytest.raises(TypeError) as ours:
        jit(power)("a", 3)
    with pytest.raises(TypeError) as theirs:
        jax.jit(power)("a", 3)
    assert str(ours.value) == str(theirs.value)


def test_a_callable_without_weak_references_raises_as_in_jax():
    class Slotted:
        __slots__ = ()

        def __call__(self, x):
            return x * 2

    fun = Slotted()
    for _ in range(2):
        with pytest.raises(TypeError) as ours:
            jit(fun)(X)
    with pytest.raises(TypeError) as theirs:
        jax.jit(Slotted())(X)  # another object: a second jax.jit of one crashes
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


def test_tracebacks_hide_the_frames_of_funcgrad():
    with pytest.raises(KeyError) as e:
        jit(lambda x: {}[1])(X)
    assert not [
        frame for frame in traceback.extract_tb(e.value.__traceback__) if "/transforms/compilation.py" in frame.filename
    ]


# ------------------------------------------------------------------------------------------------ what is told


def test_a_hit_is_not_told():
    f = jit(lambda params, x: affine(params, x))
    assert (f.retraces, len(f.retraces)) == (Retraces("<lambda>"), 0)
    p = params_of()
    f(p, X), f(p, X), f(params_of(), X + 1)
    (first,) = f.retraces
    assert (first.index, first.level, first.changes, first.count) == (1, "trace", (), 1)
    assert first.trace_s > 0
    assert first.compile_s > 0
    assert (f.retraces.traced, f.retraces.compiled) == (1, 1)


def test_the_result_does_not_change_after_it_was_read():
    f = jit(lambda params, x: affine(params, x))
    f(params_of(), X)
    before = f.retraces
    f(params_of(1), X[:1])
    assert (len(before), len(f.retraces)) == (1, 2)
    assert hash(before) != hash(f.retraces)


def in_context(f, *args):
    with jax.default_matmul_precision("highest"):
        return f(*args)


def placed(x, device=0):
    return jax.device_put(x, jax.devices()[device])


def with_axis(f, x):
    return jax.vmap(f, axis_name="i")(x[None])


J = jnp.asarray(X)
# name -> (function, options, first call, second call, level, changes)
SCENARIOS = {
    "shape": (lambda x: x, {}, (J,), (J[:2],), "trace", [("shape", "x", (3,), (2,))]),
    "rank": (lambda x: x, {}, (J,), (J[None],), "trace", [("shape", "x", (3,), (1, 3))]),
    "dtype": (lambda x: x, {}, (J,), (J.astype(int),), "trace", [("dtype", "x", "float32", "int32")]),
    "weak type": (lambda x: x, {}, (jnp.float32(1),), (1.0,), "trace", [("weak type", "x", False, True)]),
    "number": (lambda x: x, {}, (1.0,), (1,), "trace", [("dtype", "x", "float32", "int32")]),
    "key": (
        lambda k: 0,
        {},
        (jax.random.key(0),),
        (J,),
        "trace",
        [("shape", "k", (), (3,)), ("dtype", "k", "key<fry>", "float32")],
    ),
    "static": (lambda x, n: x**n, {"static_argnums": 1}, (J, 2), (J, 3), "trace", [("static", "n", "2", "3")]),
    "static, negative": (
        lambda x, n: x**n,
        {"static_argnums": -1},
        (J, 2),
        (J, 3),
        "trace",
        [("static", "n", "2", "3")],
    ),
    "static default": (
        lambda x, mode="a": x,
        {"static_argnames": "mode"},
        (J,),
        (J, "b"),
        "trace",
        [("static", "mode", "absent", "'b'")],
    ),
    "a leaf more": (
        lambda p: 0,
        {},
        ({"w": J},),
        ({"w": J, "b": J},),
        "trace",
        [("tree", "p['b']", "absent", "float32[3]")],
    ),
    "a leaf less": (lambda p: 0, {}, ([J, J],), ([J],), "trace", [("tree", "p[1]", "float32[3]", "absent")]),
    "None": (lambda p: 0, {}, ((J, None),), ((J, J),), "trace", [("tree", "p[1]", "absent", "float32[3]")]),
    "container": (
        lambda p: 0,
        {},
        ([J],),
        ((J,),),
        "trace",
        [("tree", "p", "PyTreeDef([*])", "PyTreeDef((*,))")],
    ),
    "a path": (
        lambda p: 0,
        {},
        ({"layers": [{"w": J}, {"w": J}]},),
        ({"layers": [{"w": J}, {"w": J[:1]}]},),
        "trace",
        [("shape", "p['layers'][1]['w']", (3,), (1,))],
    ),
    "rest": (lambda *args: 0, {}, (J, J), (J, J[:1]), "trace", [("shape", "args[1]", (3,), (1,))]),
    "several": (
        lambda x, y: 0,
        {},
        (J, J),
        (J[:1], J.astype(int)),
        "trace",
        [("shape", "x", (3,), (1,)), ("dtype", "y", "float32", "int32")],
    ),
    "sharding": (
        lambda x: x,
        {},
        (J,),
        (placed(J),),
        "compile",
        [("sharding", "x", "uncommitted", str(placed(J).sharding))],
    ),
    "device": (
        lambda x: x,
        {},
        (placed(J),),
        (placed(J, 1),),
        "compile",
        [("sharding", "x", str(placed(J).sharding), str(placed(J, 1).sharding))],
    ),
    "numpy": (lambda x: x, {}, (J,), (X,), "dispatch", [("leaf", "x", "jax.Array", "numpy")]),
    "python": (lambda x: x, {}, (jnp.asarray(1.0),), (1.0,), "dispatch", [("leaf", "x", "jax.Array", "Python number")]),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name):
    fun, options, first, second, level, changes = SCENARIOS[name]
    f = jit(fun, **options)
    f(*first), f(*second), f(*first), f(*second)
    assert told(f) == changes
    assert [entry.level for entry in f.retraces] == ["trace", level]
    assert [entry.index for entry in f.retraces] == [1, 2]
    assert f.retraces[1].caller.startswith(__file__)
    assert (f.retraces[1].compile_s > 0) == (level != "dispatch")


def test_call_form():
    f = jit(power)
    f(J, n=2), f(x=J, n=2)
    assert told(f) == [("call form", "x", "by position", "by keyword")]
    f(n=2, x=J)
    assert len(f.retraces) == 2


def test_context():
    f = jit(lambda x: x)
    f(J), in_context(f, J)
    assert told(f) == [("context", "jax_default_matmul_precision", "None", "highest")]
    with_axis(f, J[None])
    assert told(f)[-1] == ("context", "axis_env_state", "{}", "{'i': 1}")


def test_sharding_in_the_type():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Explicit,))
    f = jit(lambda x: 2 * x)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, PartitionSpec("d")))
        f(x), f(jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "d"))))
    assert (f.retraces[1].level, told(f)[0][:2]) == ("trace", ("sharding", "x"))


def test_method_with_static_self():
    class Layer:
        @jit(static_argnums=0)
        def apply(self, x):
            return x

        def __repr__(self):
            return "Layer()"

    layer = Layer()
    layer.apply(J), layer.apply(J[:1])
    assert told(layer.apply) == [("shape", "x", (3,), (1,))]
    Layer().apply(J)
    assert told(Layer.apply) == [("static", "self", "Layer()", "Layer()")]


def test_the_nearest_earlier_call_is_compared():
    f = jit(lambda x, y: 0)
    f(J, J), f(J[:1], J[:1]), f(J, J[:2])
    assert told(f) == [("shape", "y", (3,), (2,))]
    f(J[:1], J[:2])  # as near to the second call as to the third: the latest is told
    assert told(f) == [("shape", "x", (3,), (1,))]


def test_what_was_not_traced_is_compared_with_calls_of_the_same_program():
    f = jit(lambda x: x + 1)
    f(J), f(np.float32(1)), f(X)
    assert (f.retraces[-1].level, told(f)) == ("dispatch", [("leaf", "x", "jax.Array", "numpy")])
    g = jit(lambda x: x + 1)
    g(J), g(placed(J[:2])), g(placed(J))
    assert (g.retraces[-1].level, told(g)) == (
        "compile",
        [("sharding", "x", "uncommitted", str(placed(J).sharding))],
    )


def test_a_new_function_object_each_call():
    for _ in range(4):
        f = jit(lambda x: x + 1)  # the line
        f(J)
    first, second = f.retraces
    assert (second.level, second.count, f.retraces.traced) == ("trace", 3, 4)
    ((kind, where, before, now),) = told(f)
    line = inspect.getsourcelines(test_a_new_function_object_each_call)[1] + 2
    assert (kind, where, before, now) == ("function", f"{__file__}:{line} (<lambda>)", "made once", "made again")
    assert first.caller == second.caller == f"{__file__}:{line + 1}"


NEW = {
    "grad": lambda: jax.grad(lambda x: x.sum()),
    "vmap": lambda: jax.vmap(lambda x: x),
    "partial": lambda: functools.partial(scaled, n=2),
    "partial of grad": lambda: functools.partial(jax.grad(lambda x: x.sum())),
    "jit": lambda: jit(lambda x: x),
    "bound method": lambda: Bound().apply,
}


def scaled(x, n):
    return n * x


class Bound:
    def apply(self, x):
        return x


@pytest.mark.parametrize("name", NEW)
def test_a_new_wrapper_each_call(name):
    for _ in range(3):
        f = jit(NEW[name]())
        f(J)
    assert (len(f.retraces), f.retraces.traced, told(f)[0][0]) == (2, 3, "function")


def test_functions_that_live_side_by_side_have_each_its_own_history():
    def make(n):
        return jit(lambda x: x + n)

    several = [make(n) for n in range(3)]
    [f(J) for f in several]
    assert [len(f.retraces) for f in several] == [1, 1, 1]


def test_wrappers_of_one_function_share_what_jax_shares():
    def local(x):
        return x

    f, g = jit(local), jit(local)
    f(J), g(J)
    assert (len(f.retraces), len(g.retraces)) == (1, 0)


def test_inside_another_trace():
    f = jit(lambda x: x)
    outer = lambda x: f(x) + f(x)
    jax.jit(outer)(J), jax.jit(lambda x: outer(x))(J)
    (first,) = f.retraces
    assert (first.level, first.count, first.compile_s) == ("trace", 1, 0)  # once, however many programs it is part of
    assert first.trace_s > 0
    jax.jit(lambda x: f(x[:2]))(J)
    assert told(f) == [("shape", "x", (3,), (2,))]
    f(J)
    assert (f.retraces[-1].level, told(f)) == ("compile", [("caller", "", "inside another trace", "on its own")])
    assert f.retraces.compiled == 1


def test_cleared_caches_are_counted_where_they_were():
    f = jit(lambda x: x)
    f(J), f.clear_cache(), f(J)
    assert [(entry.level, entry.count) for entry in f.retraces] == [("trace", 2)]


def test_effects_are_no_retraces():
    f = jit(lambda x: jax.debug.callback(lambda v: None, x))
    for _ in range(3):
        f(1.0)
    jax.effects_barrier()
    assert [(entry.level, entry.count) for entry in f.retraces] == [("trace", 1)]
    f.clear_cache(), f(jnp.ones(2))
    jax.effects_barrier()
    assert told(f)[0] == ("shape", "x", (), (2,))


def test_donated_arguments_are_still_told():
    f = jit(lambda x: x + 1, donate_argnums=0)
    f(jnp.ones(3)), f(jnp.ones(4))
    assert told(f) == [("shape", "x", (3,), (4,))]


def test_a_graph_is_a_callable():
    from funcgrad.transforms.core.graph import trace

    graph = trace(affine, params_of(), X)
    np.testing.assert_allclose(jit(graph)(params_of(), X), affine(params_of(), X))


# ------------------------------------------------------------------------------------------------ max_retraces


def test_max_retraces_message():
    def update(params, batch):
        return batch["x"] + 1

    step = jit(update, max_retraces=1, donate_argnums=1)
    for n in (32, 32, 31):
        step({"w": J}, {"x": jnp.ones((n, 8))})
    last = {"x": jnp.ones((16, 8))}
    with pytest.raises(RetraceError) as e:
        step({"w": J}, last)
    line = inspect.currentframe().f_lineno - 1
    assert str(e.value) == (
        "update was traced 2 times, and max_retraces=1 allows no more.\n"
        f"  at      {__file__}:{line}\n"
        "  inputs  batch['x']  shape (31, 8) -> (16, 8)\n"
        "  try     pad batch['x'] to one shape, or drop the last, smaller batch"
    )
    assert isinstance(e.value, RuntimeError)
    assert isinstance(e.value, FuncgradError)
    assert not last["x"].is_deleted()
    assert (step.retraces.traced, len(step.retraces)) == (2, 2)
    step({"w": J}, {"x": jnp.ones((31, 8))})


def test_max_retraces_zero():
    f = jit(max_retraces=0)(lambda x: x)
    f(J), f(X), f(placed(J))  # dispatched and compiled again, not traced
    with pytest.raises(RetraceError, match="traced once"):
        f(1.0)


def test_max_retraces_leaves_the_errors_of_jax():
    f = jit(lambda x: x, max_retraces=0)
    f(J)
    with pytest.raises(TypeError, match="Error interpreting argument"):
        f("a")
    with pytest.raises(TypeError):
        f(J, J)
    with pytest.raises(OverflowError):
        f(2**80)


def test_max_retraces_counts_for_each_function_object():
    for n in range(1, 4):
        jit(lambda x: x, max_retraces=0)(J[:n])


def test_max_retraces_inside_another_trace():
    f = jit(lambda x: x, max_retraces=0)
    jax.jit(lambda x: f(x) + f(x))(J)
    f(J)
    with pytest.raises(RetraceError, match=r"shape \(3,\) -> \(1,\)"):
        jax.jit(lambda x: f(x[:1]))(J)


def test_every_kind_has_a_hint():
    from funcgrad.transforms.compilation.retraces import _HINTS

    for kind in _HINTS:
        assert Change(kind, "x", "float32", "int32").hint


# ------------------------------------------------------------------------------------------------ text


def test_text():
    f = jit(functools.wraps(affine)(lambda params, x: affine(params, x)))
    assert str(f.retraces) == "affine: traced 0 times (0.00 s), compiled 0 times (0.00 s)"
    f(params_of(), J)
    f(params_of(2), J[:2])
    f(params_of(2), X[:2])
    line = inspect.currentframe().f_lineno - 3
    head, *rows = str(f.retraces).splitlines()
    assert head.startswith("affine: traced 2 times (")
    assert rows == [
        f"  #1  trace     first call                       test_jit.py:{line}",
        f"  #2  trace     params['b']  shape (3,) -> (2,)  test_jit.py:{line + 1}",
        "                params['w']  shape (3,) -> (2,)",
        "                x  shape (3,) -> (2,)",
        f"  #3  dispatch  x  leaf jax.Array -> numpy       test_jit.py:{line + 2}",
    ]


def test_text_of_many_changes_and_long_values():
    f = jit(lambda p, config: 0, static_argnames="config")
    f([J] * 9, "a" * 200), f([X[:1]] * 9, "a" * 200), f([X[:1]] * 9, "a" * 100 + "b" * 100)
    text = str(f.retraces)
    assert "and 5 more" in text
    assert "config  static …aaaaaaaaaaaaaaaaaa" in text
    assert max(map(len, text.splitlines())) < 180


def test_text_of_one_entry():
    f = jit(lambda x, y: x)
    f(J, J), f(J[:2], J[:2]), f(X[:2], J[:2]), f.clear_cache(), f(X[:2], J[:2])
    line = inspect.currentframe().f_lineno - 1
    assert [str(entry) for entry in f.retraces] == [
        f"#1  trace  first call  test_jit.py:{line}",
        f"#2  trace  x  shape (3,) -> (2,); y  shape (3,) -> (2,)  test_jit.py:{line}",
        f"#3  dispatch ×2  x  leaf jax.Array -> numpy  test_jit.py:{line}",
    ]


def test_text_of_many_entries():
    f = jit(lambda x: x)
    for n in range(1, 21):
        f(np.ones(n))
    assert len(str(f.retraces).splitlines()) == 21
    for n in range(21, 36):
        f(np.ones(n))
    _, *rows = str(f.retraces).splitlines()
    assert [row.split()[0] for row in rows] == ["#1", "#2", "#3", "#4", "#5", "…", "#31", "#32", "#33", "#34", "#35"]
    assert rows[5] == "  … 25 more; x  shape took 35 values"


# ------------------------------------------------------------------------------------------------ leaks


def make_many(n):
    functions = [lambda x: x for _ in range(n)]
    references = [weakref.ref(f) for f in functions]
    while functions:
        f = jit(functions.pop())
        f(1.0)
        references.append(weakref.ref(f))
    return references, f.retraces


@pytest.mark.parametrize("n", [100, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_fresh_functions_do_not_leak(n):
    make_many(1)
    gc.collect()
    before = len(gc.get_objects())
    references, retraces = make_many(n)
    assert not [r for r in references[:-1] if r() is not None][1:]
    assert len(retraces) == 2
    del references
    gc.collect()
    assert len(gc.get_objects()) - before < 500 + n / 10


def test_nothing_of_the_call_is_kept_alive():
    class Config:
        pass

    f, config, x = jit(lambda x, config: x, static_argnums=1), Config(), jnp.ones(3)
    f(x, config)
    refs = [weakref.ref(config), weakref.ref(x)]
    del config, x
    jax.clear_caches(), gc.collect()  # JAX too keeps static values until then
    assert [r() for r in refs] == [None, None]
