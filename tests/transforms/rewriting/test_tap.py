"""`tap` and `patch`, compared with programs interpreted here, equation by equation, and with programs written by hand."""

from __future__ import annotations

import functools
import gc
import re
import threading
from collections import Counter, OrderedDict

import jax
import jax.ad_checkpoint
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax, subjaxprs
from jax import lax
from jax.sharding import PartitionSpec as P

import funcgrad as fg

from ... import checks
from ...checks import (
    assert_close_values,
    assert_same_program,
    assert_same_values,
    counted_compilations,
    options,
    summed,
)
from ...corpus import CORPUS
from ...sampling import sampled
from ...test_jax_contracts import on_the_host

assert_near = functools.partial(checks.assert_near, rtol=2e-5, atol=1e-6)
X = jnp.linspace(0.1, 1.0, 4)
MESH = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])
QUICK = (
    "scan",
    "cond",
    "custom_jvp_in_loops",
    "custom_vjp_in_loops",
    "checkpoint",
    "references",
    "jit_shared",
    "scopes",
)
FORMS = ("function", "graph")

EVERY = lambda site: True
SIN = fg.op("sin")
same = lambda *values: values if len(values) > 1 else values[0]
scope = jax.named_scope


def form_of(f, form, *args):
    return fg.trace(f, *args) if form == "graph" else f


# ------------------------------------------------------------------------------------------------ the corpus


@pytest.mark.parametrize("p", sampled(CORPUS, QUICK[:4]))
@pytest.mark.parametrize("form", FORMS)
def test_tap_leaves_a_program_as_it_is(p, form):
    f = form_of(p.f, form, *p.args)
    tapped = lambda *args: fg.tap(f, where=EVERY)(*args)[0]
    assert_close_values(jax.jit(tapped)(*p.args), jax.jit(p.f)(*p.args))
    if "grad" not in p.lacks:
        got = jax.jit(jax.grad(summed(tapped), **options(p)))(*p.args)
        assert_close_values(got, jax.jit(jax.grad(summed(p.f), **options(p)))(*p.args))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", sampled(CORPUS, (*QUICK, "shard_map", "while_in_scan", "custom_root", "key_arrays")))
def test_a_tap_that_finds_nothing_leaves_the_program_text(p, form):
    f = form_of(p.f, form, *p.args)
    assert_same_program(lambda *args: fg.tap(f, where="nowhere")(*args)[0], p.f, p.args)


SAMPLE = (*QUICK, "custom_linear_solve", "factorisations", "key_arrays", "scatter", "shard_map", "while_in_scan")


@pytest.mark.parametrize("p", sampled(CORPUS, SAMPLE))
def test_tap_and_patch_of_everything(p):
    """One compiled program: the outputs of each form with all that is seen, and with all of it replaced by itself."""
    graph = fg.trace(p.f, *p.args)
    names = []

    def programs(*args):
        taps = [fg.tap(f, where=EVERY)(*args) for f in (p.f, graph)]
        names.extend([*seen] for _, seen in taps)
        is_found = any(len(x) for x in names)
        patches = [fg.patch(f, where=EVERY, replace=same)(*args) for f in (p.f, graph)] if is_found else []
        return [out for out, _ in taps] + patches

    want = jax.jit(p.f)(*p.args)
    for got in jax.jit(programs)(*p.args):
        assert_close_values(got, want)
    assert names[0] == names[1]
    graph_of_tap = fg.verify(fg.tap(graph, where=EVERY))
    assert list(jax.tree.unflatten(graph_of_tap.out_tree, graph_of_tap.out_avals)[1]) == names[0]


@pytest.mark.slow
@pytest.mark.parametrize("p", [p for p in CORPUS if "grad" not in p.lacks], ids=str)
def test_gradient_of_a_program_patched_with_itself(p):
    """Where no function with a derivative rule of its own is entered."""
    rules = subjaxprs.WITH_DERIVATIVES
    graph = fg.trace(p.f, *p.args)
    if any(eqn.primitive.name in rules for _, eqn in fg.walk(graph)) or not graph.eqns:
        pytest.skip("its rules are replaced")
    patched = fg.patch(p.f, where=EVERY, replace=same)
    assert_close_values(
        jax.jit(jax.grad(summed(patched), **options(p)))(*p.args),
        jax.jit(jax.grad(summed(p.f), **options(p)))(*p.args),
    )


# ------------------------------------------------------------------------------------------------ every depth


def by_hand(f):
    """What `tap(f, where=EVERY)` returns, by interpreting the jaxpr of `f` in Python, loops unrolled."""

    def tapped(*args):
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        entries = []
        outputs = interpreted(closed, jax.tree.leaves(args), "", entries)
        counts, seen = Counter(), OrderedDict()
        for name, *rest in entries:
            seen[f"{name}#{counts[name]}"] = rest[0] if len(rest) == 1 else tuple(rest)
            counts[name] += 1
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), seen

    return tapped


def interpreted(closed, args, around, entries):
    """The outputs of a jaxpr; (name, value) or (name, value, ran) of each equation is appended to `found`."""
    jaxpr = getattr(closed, "jaxpr", closed)
    consts = getattr(closed, "consts", ())
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, _jax.Literal) else env[v]
    for eqn in jaxpr.eqns:
        path = "/".join(filter(None, (around, str(eqn.source_info.name_stack).removeprefix("vmap()"))))
        values, kind, p = [read(v) for v in eqn.invars], eqn.primitive.name, eqn.params
        outputs = _jax.bind(eqn.primitive, p, values)
        if kind in ("jit", "remat2", "compute_on", "custom_jvp_call", "custom_vjp_call"):
            interpreted(p.get("jaxpr", p.get("call_jaxpr")), values, path, entries)
        elif kind == "scan":
            entries += scanned(p, values, path)
        elif kind == "cond":
            for k, branch in enumerate(p["branches"]):
                inner = []
                interpreted(branch, values[1:], path, inner)
                entries += [flagged(x, values[0] == k) for x in inner]
        elif kind == "while":
            entries += looped(p, values, path)
        entries.append(("/".join(filter(None, (path, kind))), outputs[0] if len(outputs) == 1 else tuple(outputs)))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def flagged(entry, ran):
    """What a branch or an iteration found, zeros where it did not run."""
    name, value, *inner = entry
    ran = jnp.asarray(ran)
    zero = lambda x: jnp.where(jnp.reshape(ran, (1,) * x.ndim), x, jnp.zeros_like(x))
    return name, jax.tree.map(zero, value), (jax.tree.map(zero, inner[0]) if inner else ran)


def scanned(p, values, path):
    if "num_consts" in p:
        n, m = p["num_consts"], p["num_carry"]
    else:
        consts, carry, _ = p["ft_in"].unpack()
        n, m = len(consts), len(carry)
    consts, carry, xs = values[:n], values[n : n + m], values[n + m :]
    steps = {}
    for k in reversed(range(p["length"])) if p["reverse"] else range(p["length"]):
        steps[k] = []
        carry = interpreted(p["jaxpr"], [*consts, *carry, *(x[k] for x in xs)], path, steps[k])[:m]
    entries = zip(*(steps[k] for k in sorted(steps)), strict=True)
    return [
        (each[0][0], *(jax.tree.map(lambda *x: jnp.stack(x), *c) for c in zip(*(e[1:] for e in each), strict=True)))
        for each in entries
    ]


def looped(p, values, path):
    n, m = p["cond_nconsts"], p["body_nconsts"]
    cond, body, carry = values[:n], values[n : n + m], values[n + m :]
    test = lambda entries: interpreted(p["cond_jaxpr"], [*cond, *carry], path, entries)[0]
    last, ran = [], False
    if not test([]):
        interpreted(p["body_jaxpr"], [*body, *carry], path, last)
    while test([]):
        last, ran = [], True
        carry = interpreted(p["body_jaxpr"], [*body, *carry], path, last)
    final = []
    test(final)
    flag = lambda x: flagged(x, ran) if len(x) == 2 or not ran else x
    return [*map(flag, last), *final]


@jax.custom_jvp
def by_jvp(x):
    return jnp.sin(x) * 2


by_jvp.defjvp(lambda primals, tangents: (by_jvp(*primals), tangents[0] * 3))


@jax.custom_vjp
def by_vjp(x):
    return jnp.sin(x) * 2


by_vjp.defvjp(lambda x: (by_vjp(x), x), lambda x, ct: (ct * x,))


def scan(f, n=3):
    return lambda x: lax.scan(lambda c, k: (f(c) * 0.5, (f(c * k), k)), x, jnp.arange(1.0, n + 1))


def cond(f):
    return lambda x: lax.cond(x[0] > 0.3, lambda x: f(x), lambda x: 2 * jnp.cos(x), x)


def switch(f):
    return lambda x: lax.switch((x[0] > 0.3).astype(jnp.int32) * 2, [f, jnp.cos, lambda x: f(jnp.exp(x))], x)


def fori(f):
    return lambda x: lax.fori_loop(0, 3, lambda k, x: f(x) * 1.5, x)


def while_loop(f):
    step = lambda s: (s[0] + 1, f(s[1]) * 0.5)
    return lambda x: lax.while_loop(lambda s: (s[0] < 3) & (jnp.sum(f(s[1])) > 0.5), step, (0, x))[1]


first = lambda f: lambda x: jax.tree.leaves(f(x))[0]
PROGRAMS = {
    "plain": jnp.sin,
    "jit": jax.jit(jnp.sin),
    "jit twice": lambda x: jax.jit(jnp.sin)(jax.jit(jnp.sin)(x)),
    "scan": scan(jnp.sin),
    "scan reversed": lambda x: lax.scan(lambda c, k: (jnp.sin(c) * k, None), x, jnp.arange(3.0), reverse=True),
    "cond": cond(jnp.sin),
    "switch": switch(jnp.sin),
    "while": while_loop(jnp.sin),
    "fori": fori(jnp.sin),
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)) * 2),
    "compute_on": on_the_host(lambda x: jnp.sin(jnp.sin(x)) * 2),
    "custom_jvp": by_jvp,
    "custom_vjp": by_vjp,
    "relu and softplus": lambda x: jax.nn.relu(jax.nn.softplus(x) - 0.8),
    "jit in scan in cond in scan": scan(cond(first(scan(jax.jit(jnp.sin), 2)))),
    "cond in cond": cond(switch(jnp.sin)),
    "while in scan": scan(while_loop(jnp.sin)),
    "scan in while": while_loop(first(scan(jnp.sin, 2))),
    "cond in while": while_loop(cond(jnp.sin)),
    "while in cond": cond(while_loop(jnp.sin)),
    "remat in scan": scan(jax.checkpoint(jnp.sin)),
    "scan in remat": jax.checkpoint(scan(jnp.sin)),
    "custom_jvp in scan in cond": cond(first(scan(by_jvp))),
    "custom_vjp in scan in cond": cond(first(scan(by_vjp))),
    "custom_vjp in jit in remat": jax.checkpoint(jax.jit(by_vjp)),
    "custom rules in while": while_loop(lambda x: by_jvp(x) * 0.4),
    "relu in scan": scan(jax.nn.relu),
    "several outputs": lambda x: (lax.top_k(x, 2), jnp.linalg.qr(jnp.outer(x, x) + jnp.eye(4)), jnp.split(x, 2)),
    "several outputs in scan": lambda x: lax.scan(
        lambda c, _: (lax.sort((c, -c), num_keys=1)[1], lax.top_k(c, 2)), x, None, 2
    ),
    "integers and booleans": scan(lambda x: jnp.where(jnp.argsort(x) > 1, x, -x)),
    "vmap in scan": scan(jax.vmap(lambda x: jnp.sin(x) * x)),
    "scopes": lambda x: scan(scoped)(scoped(x)),
}


def scoped(x):
    with scope("a"):
        y = jnp.sin(x)
        with scope("b"):
            z = jnp.cos(y)
    return y * z


LOOPS = {name for name in PROGRAMS if "while" in name}
DERIVED = {"scan", "cond", "fori", "remat", "custom_jvp", "custom_vjp"}  # in every run
FORWARD_ONLY = LOOPS - {"fori"}
ONLY_REVERSE = {name for name in PROGRAMS if "vjp" in name}


DEEP = ("jit in scan in cond in scan", "cond in cond", "while in scan", "cond in while", "scan in remat")
HOLDERS = ("plain", "jit", "scan", "cond", "switch", "while", "fori", "remat", "compute_on", "custom_jvp", "custom_vjp")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", sampled(PROGRAMS, (*HOLDERS, *DEEP, "scan reversed", "relu and softplus", "several outputs in scan"))
)
def test_every_operation_is_seen(name, form):
    f = PROGRAMS[name]
    x = X + 0.3 if "cond" in name and form == "graph" else X  # the other branch
    tapped = fg.tap(form_of(f, form, x), where=EVERY)
    want = by_hand(f)(x)
    got = jax.jit(tapped)(x)
    assert list(got[1]) == list(want[1])
    assert_near(got, want)
    if form == "graph":
        fg.verify(tapped)


@pytest.mark.parametrize("name", ["plain", "scan", "cond", "while", "remat", "custom_jvp", "custom_vjp", "scopes"])
def test_every_operation_of_a_running_function_is_seen(name):
    f = PROGRAMS[name]
    got, want = fg.tap(f, where=EVERY)(X), by_hand(f)(X)
    assert list(got[1]) == list(want[1])
    assert_near(got, want)


def weighted(tapped):
    """A scalar to which every element of the result, and of all that is seen, contributes."""

    def total(x):
        leaves = [v for v in jax.tree.leaves(tapped(x)) if jnp.issubdtype(v.dtype, jnp.floating)]
        return sum((jnp.sum(jnp.sin(v + k)) for k, v in enumerate(leaves)), start=jnp.float32(0))

    return total


def linearized(f, x):
    out, push = jax.linearize(f, x)
    return out, push(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sampled(PROGRAMS, DERIVED))
def test_derivatives_through_what_is_seen(name, form):
    f = PROGRAMS[name]
    tapped, total = fg.tap(form_of(f, form, X), where=EVERY), weighted(by_hand(f))
    compiled = (lambda g: g) if name in LOOPS else jax.jit  # while loops are interpreted with concrete values
    if name not in FORWARD_ONLY:
        want = compiled(jax.grad(total))(X)
        assert_near(jax.jit(jax.grad(weighted(tapped)))(X), want)
    if name not in ONLY_REVERSE:
        want = compiled(lambda x: jax.jvp(total, (x,), (x,)))(X)
        assert_near(jax.jit(lambda x: jax.jvp(weighted(tapped), (x,), (x,)))(X), want)
        assert_near(jax.jit(lambda x: linearized(weighted(tapped), x))(X), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ONLY_REVERSE | FORWARD_ONLY])
def test_second_derivatives_through_what_is_seen(name):
    got = jax.jit(jax.hessian(weighted(fg.tap(PROGRAMS[name], where=EVERY))))(X)
    want = jax.jit(jax.hessian(weighted(by_hand(PROGRAMS[name]))))(X)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sampled([n for n in PROGRAMS if n != "several outputs"], HOLDERS))
def test_vmap_of_a_tapped_program(name, form):
    f = PROGRAMS[name]
    xs = jnp.stack([X, X + 0.3, -X])
    got = jax.jit(jax.vmap(fg.tap(form_of(f, form, X), where=SIN)))(xs)
    each = [by_hand(f)(x) for x in xs]  # in Python: a while loop runs as often as each lane needs
    want = [
        (out, OrderedDict((k, v) for k, v in seen.items() if k.split("/")[-1].startswith("sin#"))) for out, seen in each
    ]
    assert_near(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want))


def test_tap_of_a_vmapped_program():
    xs = jnp.stack([X, X + 0.3])
    out, seen = fg.tap(jax.vmap(scan(jnp.sin)), where=SIN)(xs)
    assert_near(out, jax.vmap(scan(jnp.sin))(xs))
    assert {k: v.shape for k, v in seen.items()} == {"sin#0": (3, 2, 4), "sin#1": (3, 2, 4)}
    out, seen = fg.tap(jax.vmap(cond(jnp.sin)), where=SIN)(xs)  # both branches run: a batched cond is a selection
    assert_near(seen["sin#0"], jnp.sin(xs))


# ------------------------------------------------------------------------------------------------ by hand


def test_a_scan_by_hand():
    f = lambda x: lax.scan(lambda c, k: (jnp.tanh(c) * k, c), x, jnp.arange(3.0))
    g = lambda x: lax.scan(lambda c, k: ((y := jnp.tanh(c)) * k, (c, y)), x, jnp.arange(3.0))
    out, seen = fg.tap(f, where=fg.op("tanh"))(X)
    carry, (ys, tanhs) = g(X)
    assert_same_values((out, dict(seen)), ((carry, ys), {"tanh#0": tanhs}))


def test_a_cond_by_hand():
    f = lambda x: lax.cond(x > 0, jnp.tanh, lambda x: x - 1, x)
    for x in (1.0, -1.0):
        out, seen = fg.tap(f, where=fg.op("tanh"))(x)
        assert_same_values(out, f(x))
        value, ran = seen["tanh#0"]
        assert (float(value), bool(ran)) == ((float(jnp.tanh(x)), True) if x > 0 else (0.0, False))


def test_a_while_by_hand():
    f = lambda x: lax.while_loop(lambda x: x < 10, lambda x: x + jnp.exp(x), x)
    for start in (0.0, 20.0):
        value, ran = fg.tap(f, where=fg.op("exp"))(start)[1]["exp#0"]
        x, last = start, 0.0
        while x < 10:
            last = np.exp(x)
            x = x + last
        assert float(value) == pytest.approx(last)
        assert bool(ran) == (start < 10)


def test_attention_weights():
    """What the feature is for: weights of each head, and their gradients, of a model nobody wrote for it."""

    def model(params, x):
        for k, w in enumerate(params):
            with scope(f"block_{k}"), scope("attention"):
                weights = jax.nn.softmax(x @ w @ x.T)
                x = weights @ x
        return jnp.sum(x**2)

    def written(params, x):
        weights = []
        for w in params:
            weights.append(jax.nn.softmax(x @ w @ x.T))
            x = weights[-1] @ x
        return jnp.sum(x**2), weights

    key = jax.random.key(0)
    params = list(jax.random.normal(key, (2, 3, 3)))
    x = jax.random.normal(key, (5, 3))
    where = lambda site: site.primitive.name == "div" and site.scope.endswith("attention")
    out, seen = jax.jit(fg.tap(model, where=where))(params, x)
    want = jax.jit(written)(params, x)
    assert list(seen) == ["block_0/attention/div#0", "block_1/attention/div#0"]
    assert_close_values((out, list(seen.values())), want)
    entropy = lambda weights: -sum(jnp.sum(w * jnp.log(w)) for w in weights)
    got = jax.jit(jax.grad(lambda p: entropy(fg.tap(model, where=where)(p, x)[1].values())))(params)
    assert_near(got, jax.jit(jax.grad(lambda p: entropy(written(p, x)[1])))(params))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", sampled([n for n in PROGRAMS if "several" not in n and "integers" not in n], (*HOLDERS, *DEEP[:3]))
)
def test_an_operation_is_replaced_at_every_depth(name, form):
    """Against the same program with another function in the place of sin."""
    f, scale = PROGRAMS[name], jnp.float32(0.9)
    replaced = "max" if "relu" in name else "sin"
    patched = fg.patch(form_of(f, form, X), where=fg.op(replaced), replace=lambda v: v * scale)
    primitive = getattr(lax, replaced + "_p")
    want = jax.jit(fg.live(f, {primitive: lambda eqn, *v: primitive.bind(*v, **eqn.params) * scale}))(X)
    assert_near(jax.jit(patched)(X), want)


def test_a_replaced_rule_is_differentiated_as_it_stands():
    for f in (by_jvp, by_vjp):
        assert_near(jax.grad(lambda x: jnp.sum(fg.patch(f, where=SIN, replace=lambda v: 2 * v)(x)))(X), 4 * jnp.cos(X))
        kept = fg.patch(lambda x: f(jnp.tanh(x)), where=fg.op("tanh"), replace=lambda v: 2 * v)
        want = jax.grad(lambda x: jnp.sum(f(2 * jnp.tanh(x))))(X)
        assert_near(jax.grad(lambda x: jnp.sum(kept(x)))(X), want)


# ------------------------------------------------------------------------------------------------ functions stay functions


def test_python_runs_as_it_is():
    state = []

    def f(x, mode, *, flag=True):
        state.append(mode)
        return (jnp.sin(x) if x > 0 else x, mode) if flag else None

    tapped = fg.tap(f, where=SIN)
    (out, mode), seen = tapped(1.0, "a")
    assert (float(out), mode, list(seen)) == (pytest.approx(np.sin(1.0)), "a", ["sin#0"])
    assert tapped(-1.0, "b") == ((-1.0, "b"), OrderedDict())
    assert tapped(1.0, "c", flag=False)[0] is None
    assert state == ["a", "b", "c"]
    assert tapped.__name__ == "f"
    grads = jax.grad(lambda x: fg.tap(lambda x: jnp.sin(x) if x > 0 else x, where=SIN)(x)[0])(1.0)
    assert float(grads) == pytest.approx(np.cos(1.0))


def test_values_are_plain_arrays_while_the_function_runs():
    held = []
    fg.tap(lambda x: held.append(jnp.sin(x)), where=SIN)(1.0)
    assert not isinstance(held[0], jax.core.Tracer)


def test_decorators():
    @fg.tap(where=SIN)
    def tapped(x):
        return jnp.sin(x)

    @fg.patch(where=SIN, replace=lambda v: 2 * v)
    def patched(x):
        return jnp.sin(x)

    assert list(tapped(1.0)[1]) == ["sin#0"]
    assert float(patched(1.0)) == pytest.approx(2 * np.sin(1.0))


def layered(x):
    with scope("layer_0"):
        x = jnp.sin(x) * 2
    with scope("layer_1"):
        x = jnp.tanh(x) * 3
    return jnp.sum(x)


def test_a_graph_gives_a_graph():
    graph = fg.trace(layered, X)
    tapped = fg.verify(fg.tap(graph, where="layer_*"))
    assert (tapped.name, tapped.paths, tapped.in_avals) == ("tap(layered)", graph.paths, graph.in_avals)
    patched = fg.verify(fg.patch(graph, where="layer_0", replace=same))
    assert patched.name == "patch(layered)"
    assert isinstance(fg.grad(tapped, has_aux=True), fg.Graph)
    got, seen = fg.grad(tapped, has_aux=True)(X)
    assert_near(got, jax.grad(layered)(X))
    assert list(seen) == ["layer_0/mul#0", "layer_1/mul#0"]
    assert isinstance(fg.vmap(tapped, axis_size=2), fg.Graph)
    with pytest.raises(
        fg.ArgumentError, match=re.escape("tap(layered) takes x of type float32[4], and got float32[3].")
    ):
        tapped(X[:3])


def test_order_survives_jit():
    f = lambda x: jnp.sin(jnp.tanh(jnp.exp(x)))
    names = ["exp#0", "tanh#0", "sin#0"]
    assert list(fg.tap(f, where=EVERY)(X)[1]) == names
    assert list(jax.jit(fg.tap(f, where=EVERY))(X)[1]) == names
    assert list(jax.vmap(jax.jit(fg.tap(f, where=EVERY)))(X)[1]) == names
    assert list(fg.jit(fg.tap(f, where=EVERY))(X)[1]) == names
    graph = fg.tap(fg.trace(f, X), where=EVERY)
    assert [k.key for path, _ in jax.tree_util.tree_leaves_with_path(graph(X)[1]) for k in path] == names


# ------------------------------------------------------------------------------------------------ tap and patch together


def test_tap_of_tap_and_of_patch():
    f = lambda x: jnp.cos(jnp.sin(x))
    (out, inner), outer = fg.tap(fg.tap(f, where=SIN), where=fg.op("cos"))(X)
    assert_near((inner["sin#0"], outer["cos#0"], out), (jnp.sin(X), f(X), f(X)))
    patched = fg.patch(f, where=SIN, replace=lambda v: 2 * v)
    out, seen = fg.tap(patched, where=fg.op("cos"))(X)
    assert_near((out, seen["cos#0"]), (jnp.cos(2 * jnp.sin(X)),) * 2)
    out, seen = fg.patch(fg.tap(f, where=fg.op("cos")), where=SIN, replace=lambda v: 2 * v)(X)
    assert_near((out, seen["cos#0"]), (jnp.cos(2 * jnp.sin(X)),) * 2)
    out, seen = fg.patch(fg.tap(f, where=SIN), where=SIN, replace=lambda v: 2 * v)(X)
    assert_near((out, seen["sin#0"]), (jnp.cos(2 * jnp.sin(X)), 2 * jnp.sin(X)))


@pytest.mark.parametrize("f", [by_jvp, by_vjp])
def test_taps_of_functions_with_rules_nest(f):
    (out, inner), outer = fg.tap(fg.tap(f, where=SIN), where=SIN)(X)
    assert_near((out, inner["sin#0"], outer["sin#0"]), (f(X), jnp.sin(X), jnp.sin(X)))
    assert list(outer) == ["sin#0"]
    total = lambda x: jnp.sum(fg.tap(fg.tap(f, where=SIN), where=SIN)(x)[0][0])
    assert_near(jax.jit(jax.grad(total))(X), jax.grad(lambda x: jnp.sum(f(x)))(X))
    lived = fg.tap(fg.live(f, {lax.sin_p: lambda eqn, v: lax.sin(v) * 2}), where=SIN)
    assert_near(lived(X)[0], 2 * f(X))


def test_interchange_intervention():
    """Geiger et al.: what a unit is in one run stands in another run."""
    f = lambda x: jnp.sum(jax.named_call(jnp.sin, name="unit")(x)) * x[0]
    base, source = X, X + 1
    (value,) = fg.tap(f, where="unit")(source)[1].values()
    assert_near(fg.patch(f, where="unit", replace=value)(base), jnp.sum(jnp.sin(source)) * base[0])
    assert_near(fg.patch(fg.trace(f, X), where="unit", replace=value)(base), jnp.sum(jnp.sin(source)) * base[0])
    effect = lambda v: fg.patch(f, where="unit", replace=v)(base)
    assert_near(jax.jit(jax.grad(effect))(value), jnp.full(4, base[0]))
    assert_near(jax.vmap(effect)(jnp.stack([value, 2 * value])), jnp.array([1.0, 2.0]) * effect(value))


# ------------------------------------------------------------------------------------------------ once, and without leaks


@pytest.mark.parametrize("verb", ["tap", "patch"])
@pytest.mark.parametrize("name", ["jit", "cond", "while", "remat in scan"])
def test_a_sub_graph_is_compiled_once(name, verb):
    inner = jax.jit(lambda x: PROGRAMS[name](x))
    probed = fg.tap(inner, where=SIN) if verb == "tap" else fg.patch(inner, where=SIN, replace=lambda v: 2 * v)
    outer = jax.jit(probed)
    probed(X), outer(X)
    with counted_compilations() as compilations:
        probed(X), outer(X)
    assert not compilations


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", ["tap", "tap of a scan", "patch", "tap of a Graph", "one tap"])
def test_wrappers_of_fresh_functions_leave_memory_stable(verb, count):
    loop = lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]
    current = []
    once = fg.tap(lambda x: current[0](x), where=SIN)

    def wrap(f):
        current[:] = [f]
        return {
            "tap": lambda: fg.tap(f, where=SIN)(1.0),
            "tap of a scan": lambda: jax.eval_shape(fg.tap(loop(f), where=SIN), 1.0),
            "patch": lambda: fg.patch(f, where=SIN, replace=lambda v: 2 * v)(1.0),
            "tap of a Graph": lambda: fg.tap(fg.trace(loop(f), 1.0), where=SIN),
            "one tap": lambda: jax.eval_shape(lambda x: once(x), 1.0),
        }[verb]()

    def objects_after(n):
        for k in range(n):
            wrap(lambda x, k=k: jax.jit(lambda x: jnp.sin(x) * k)(x) if verb == "one tap" else jnp.sin(x) * k)
        jax.clear_caches()
        gc.collect()
        return len(gc.get_objects())

    objects_after(10)
    assert objects_after(count) - objects_after(10) < 80


def test_no_tracer_leaks():
    with jax.checking_leaks():
        for name in ("custom_jvp in scan in cond", "remat in scan"):
            jax.jit(jax.grad(weighted(fg.tap(PROGRAMS[name], where=EVERY)))).lower(X)
            jax.jit(fg.patch(PROGRAMS[name], where=SIN, replace=lambda v: v * 2)).lower(X)
        jax.jit(jax.grad(weighted(fg.patch(layered, where="layer_0", replace=lambda v: v * 2)))).lower(X)


def test_replacements_that_close_over_traced_values():
    f = PROGRAMS["jit in scan in cond in scan"]
    patched = lambda scale: fg.patch(f, where=SIN, replace=lambda v: v * scale)(X)
    want = lambda scale: fg.live(f, {lax.sin_p: lambda eqn, v: lax.sin(v) * scale})(X)
    total = lambda g: lambda s: jax.tree.reduce(lambda a, b: a + jnp.sum(b), g(s), 0.0)
    assert_near(*(jax.jit(jax.grad(total(f)))(1.5) for f in (patched, want)))
    assert_near(*(jax.jit(jax.vmap(f))(jnp.array([1.0, 2.0])) for f in (patched, want)))


@pytest.mark.parametrize("context", [jax.disable_jit, jax.enable_checks, jax.debug_nans])
def test_contexts(context):
    with context(True):
        out, seen = fg.tap(scan(jax.nn.softplus), where=fg.op("log1p"))(X)
        if context is not jax.disable_jit:
            assert list(seen) == ["log1p#0", "log1p#1"]
    assert_near(out, scan(jax.nn.softplus)(X))


def test_threads_do_not_see_each_others_values():
    results = {}
    barrier = threading.Barrier(4)
    tapped = fg.tap(jax.jit(lambda x: scan(jnp.sin)(x)), where=SIN)

    def run(k):
        barrier.wait()
        results[k] = [fg.tap(lambda x: jnp.sin(x * k), where=SIN)(X)[1], tapped(X * k)[1]]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k in range(4):
        assert_near(results[k], [OrderedDict({"sin#0": jnp.sin(X * k)}), tapped(X * k)[1]])


def test_an_error_of_the_function_leaves_no_trace_behind():
    with pytest.raises(ZeroDivisionError):
        fg.tap(lambda x: 1 / 0, where=SIN)(1.0)
    assert float(lax.sin(1.0)) == pytest.approx(np.sin(1.0))


# ------------------------------------------------------------------------------------------------ kinds of values


def test_keys():
    def f(key):
        with scope("a"):
            key, other = jax.random.split(key)
        key = lax.cond(True, jax.random.clone, lambda k: jax.random.fold_in(k, 1), key)
        return jax.random.uniform(key) + jax.random.uniform(other)

    key = jax.random.key(0)
    for form in FORMS:
        out, seen = jax.jit(fg.tap(form_of(f, form, key), where="a"))(key)
        assert_close_values(out, f(key))
        for got, want in zip(seen.values(), jax.random.split(key), strict=True):
            assert_same_values(got, want)
        zero = fg.patch(
            form_of(f, form, key), where="a", replace=lambda k: jax.random.wrap_key_data(jnp.zeros(2, "uint32"))
        )
        want = 2 * jax.random.uniform(jax.random.wrap_key_data(jnp.zeros(2, "uint32")))
        assert_close_values(jax.jit(zero)(key), want)
    keys = lambda site: jnp.issubdtype(site.out_avals[0].dtype, jax.dtypes.prng_key)
    out, seen = fg.tap(f, where=keys)(key)
    assert_close_values(out, f(key))
    walk = lambda k: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jax.random.fold_in(s[1], s[0])), (0, k))
    value, ran = next(iter(jax.jit(fg.tap(walk, where=keys))(key)[1].values()))
    assert bool(ran)
    assert_same_values(value, walk(key)[1])


def test_weak_types_stay():
    f = lambda x: jnp.sin(x * 2) * jnp.float32(2)
    for form in FORMS:
        tapped, patched = (
            fg.tap(form_of(f, form, 1.0), where=EVERY),
            fg.patch(form_of(f, form, 1.0), where=EVERY, replace=lambda v: jnp.float32(1)),
        )
        out, seen = jax.jit(tapped)(1.0)
        assert (seen["sin#0"].weak_type, out.weak_type) == (True, False)
        assert (patched(1.0).weak_type, float(patched(1.0))) == (False, 1.0)
        assert fg.patch(form_of(jnp.sin, form, 1.0), where=SIN, replace=jnp.float32(1))(1.0).weak_type


def test_references():
    def f(x):
        total = jax.new_ref(jnp.zeros(4))

        def body(c, _):
            total[...] += jnp.sin(c)
            return c + 1, None

        lax.scan(body, x, None, length=3)
        return total[...]

    want = f(X)
    for form in FORMS:
        out, seen = jax.jit(fg.tap(form_of(f, form, X), where=SIN))(X)
        assert_near((out, seen["sin#0"]), (want, jnp.sin(X + jnp.arange(3.0)[:, None])))
        assert_near(fg.patch(form_of(f, form, X), where=SIN, replace=lambda v: 2 * v)(X), 2 * want)
    assert_near(fg.tap(f, where=EVERY)(X)[0], want)


def test_effects_happen_as_often_as_without():
    def printing(x):
        jax.debug.callback(lambda v: calls.append(float(v)), x[0])
        return jnp.sin(x)

    rule, backward = jax.custom_jvp(printing), jax.custom_vjp(printing)
    rule.defjvp(lambda primals, tangents: (rule(*primals), tangents[0]))
    backward.defvjp(lambda x: (backward(x), None), lambda _, ct: (ct,))

    def f(x):
        loop = lambda g: lax.scan(lambda c, _: (g(c), None), x, None, length=2)[0]
        jax.debug.callback(lambda: calls.append(0.0))
        return loop(printing) + loop(rule) + loop(backward) + rule(x) + jax.jit(backward)(x)

    def count(g):
        calls.clear()
        jax.block_until_ready(g(X))
        jax.effects_barrier()
        return len(calls)

    calls = []
    of_value, of_gradient = count(jax.jit(f)), count(jax.jit(jax.grad(lambda x: jnp.sum(f(x)))))
    for form in FORMS:
        tapped = fg.tap(form_of(f, form, X), where=SIN)
        assert count(jax.jit(tapped)) == of_value
        assert count(jax.jit(jax.grad(lambda x: jnp.sum(tapped(x)[0])))) == of_gradient
        assert count(jax.jit(fg.patch(form_of(f, form, X), where=SIN, replace=same))) == of_value
    assert count(fg.tap(f, where=SIN)) == of_value


@pytest.mark.parametrize("rule", [jax.custom_jvp, jax.custom_vjp])
def test_what_a_function_with_rules_writes_is_written_once(rule):
    def f(x):
        total = jax.new_ref(jnp.zeros(4))

        @rule
        def added(x):
            total[...] += jnp.sin(x)
            return jnp.cos(x)

        if rule is jax.custom_jvp:
            added.defjvp(lambda primals, tangents: (added(*primals), tangents[0]))
        else:
            added.defvjp(lambda x: (added(x), None), lambda _, ct: (ct,))
        return added(x) + total[...]

    out, seen = fg.tap(f, where=EVERY)(X)
    assert_near(out, jnp.cos(X) + jnp.sin(X))
    seen = fg.tap(fg.trace(f, X), where=fg.op("sin", "cos")).out_tree
    assert jax.tree.unflatten(seen, range(seen.num_leaves)) == (0, OrderedDict())  # nothing is seen in what has effects
    if rule is jax.custom_vjp:  # JAX does not compile the other one
        for form in FORMS:
            assert_near(jax.jit(fg.tap(form_of(f, form, X), where=EVERY))(X)[0], jnp.cos(X) + jnp.sin(X))
            assert_near(jax.jit(fg.patch(form_of(f, form, X), where=SIN, replace=same))(X), jnp.cos(X) + jnp.sin(X))


def test_the_predicate_of_a_while_that_prints_runs_once_a_test():
    def test(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(jnp.sin(x)) > 0.5

    calls = []
    jax.block_until_ready(jax.jit(fg.tap(lambda x: lax.while_loop(test, lambda x: x / 2, x), where=SIN))(X))
    jax.effects_barrier()
    by_tap, calls[:] = len(calls), []
    jax.block_until_ready(jax.jit(lambda x: lax.while_loop(test, lambda x: x / 2, x))(X))
    jax.effects_barrier()
    assert by_tap == len(calls)


def test_batching_rules_of_the_user_stay():
    @jax.custom_batching.custom_vmap
    def f(x):
        return jnp.sin(x)

    f.def_vmap(lambda size, is_batched, x: (jnp.sin(x) * 100, is_batched[0]))
    out, seen = jax.vmap(fg.tap(f, where=SIN))(X)
    assert_near((out, seen["sin#0"]), (100 * jnp.sin(X), jnp.sin(X)))
    assert_near(jax.vmap(fg.patch(f, where=SIN, replace=lambda v: 2 * v))(X), 2 * jnp.sin(X))


@pytest.mark.parametrize("form", FORMS)
def test_shard_map(form):
    def f(x):
        body = lambda x: lax.scan(lambda c, _: (jnp.sin(c) * lax.pmean(jnp.cos(c), "i"), None), x, None, length=2)[0]
        return jax.shard_map(body, mesh=MESH, in_specs=P("i"), out_specs=P("i"))(jnp.tanh(x))

    def by_hand(x):
        body = lambda x: lax.scan(lambda c, _: (2 * jnp.sin(c) * lax.pmean(jnp.cos(c), "i"), None), x, None, length=2)[
            0
        ]
        return jax.shard_map(body, mesh=MESH, in_specs=P("i"), out_specs=P("i"))(jnp.tanh(x))

    g = form_of(f, form, X)
    want = jax.jit(f)(X)
    assert_near(jax.jit(fg.patch(g, where=SIN, replace=lambda v: 2 * v))(X), jax.jit(by_hand)(X))
    for run in (lambda t: t, jax.jit) if form == "function" else (jax.jit,):
        out, seen = run(fg.tap(g, where=fg.op("sin", "tanh", "shard_map")))(X)
        assert list(seen) == ["tanh#0", "shard_map#0"]
        assert_near((out, seen["shard_map#0"]), (want, want))
    assert_near(jax.jit(fg.patch(g, where=fg.op("shard_map"), replace=lambda v: 2 * v))(X), 2 * want)


@pytest.mark.parametrize("name", sampled(["cond", "while", "scan", "remat"], ["cond", "scan"]))
def test_tap_inside_of_a_shard_map(name):
    f = PROGRAMS[name]
    xs = jnp.linspace(0.1, 1.0, 16).reshape(4, 4)

    def shards(tapped):
        body = lambda x: jax.tree.map(lambda v: v[None], tapped(x[0]))
        return jax.shard_map(body, mesh=MESH, in_specs=P("i"), out_specs=P("i"))

    want = [fg.tap(f, where=SIN)(x) for x in xs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *want)
    assert_near(jax.jit(shards(fg.tap(f, where=SIN)))(xs), stacked)
    assert_near(jax.jit(shards(fg.tap(fg.trace(f, X), where=SIN)))(xs), stacked)


@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_room_is_left_as_it_is(form):
    batched = jax.vmap(while_loop(jnp.sin))
    solve = lambda x: lax.custom_linear_solve(
        lambda v: jnp.sin(2.0) * v, x, lambda mv, b: b / jnp.sin(2.0), symmetric=True
    )
    for f, x in ((batched, jnp.stack([X, 2 * X])), (solve, X)):
        out, seen = jax.jit(fg.tap(form_of(f, form, x), where=SIN))(x)
        assert_near((out, list(seen)), (f(x), []))
    assert_near(
        jax.jit(fg.patch(form_of(solve, form, X), where=SIN, replace=lambda v: 2 * v))(X), X / (2 * jnp.sin(2.0))
    )


# ------------------------------------------------------------------------------------------------ models


def test_models_of_fg_nn():
    from funcgrad import nn

    model = nn.serial(nn.dense(5), jnp.tanh, nn.residual(nn.serial(nn.dense(5), jnp.tanh)), nn.dense(2))
    x = jnp.ones((3, 4))
    params, _ = model.init(jax.random.key(0), x)
    for form in FORMS:
        out, seen = fg.tap(form_of(model, form, params, x), where="dense_0")(params, x)
        assert_close_values(out, model(params, x))
        dense = params["dense_0"]
        assert_close_values(next(iter(seen.values())), x @ dense["w"] + dense["b"])
        assert all("dense_0/" in name for name in seen)
        silent = fg.patch(form_of(model, form, params, x), where="dense_*", replace=jnp.zeros_like)
        assert_close_values(silent(params, x), jnp.zeros((3, 2)))


@pytest.mark.standard_promotion
def test_flax_linen_names_its_scopes():
    import flax.linen as linen

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x + jnp.tanh(linen.Dense(4, name="inner")(x))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for k in range(2):
                x = Block(name=f"block_{k}")(x)
            return x

    x = jnp.ones((3, 4))
    params = Model().init(jax.random.key(0), x)
    want = []
    h = x
    for k in range(2):
        dense = params["params"][f"block_{k}"]["inner"]
        want.append(h @ dense["kernel"] + dense["bias"])
        h = h + jnp.tanh(want[-1])
    for form in FORMS:
        out, seen = fg.tap(form_of(Model().apply, form, params, x), where="block_*/inner")(params, x)
        assert_close_values((out, list(seen.values())), (h, want))
        assert [name.split("/")[-3:-1] for name in seen] == [["block_0", "inner"], ["block_1", "inner"]]


@pytest.mark.standard_promotion
def test_models_of_nnx_and_equinox_in_named_scopes():
    import equinox as eqx
    from flax import nnx

    x = jnp.ones((3, 4))
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    other = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))

    def f(x):
        with jax.named_scope("nnx"):
            x = linear(x)
        with jax.named_scope("equinox"):
            return jax.vmap(other)(x)

    out, seen = jax.jit(fg.tap(f, where="nnx"))(x)
    assert_near((out, list(seen.values())[-1]), (f(x), linear(x)))
    out, seen = jax.jit(fg.tap(f, where="equinox"))(x)
    assert_near(list(seen.values())[-1], f(x))
    products = lambda f, *args: fg.tap(f, where=fg.op("dot_general"))(*args)[1].values()
    loss = lambda model: sum(map(jnp.sum, products(jax.vmap(model), x)))
    want = lambda model: sum(
        jnp.sum(h @ m.weight.T) for h, m in ((x, model.layers[0]), (hidden(model), model.layers[1]))
    )
    hidden = lambda model: jax.nn.relu(x @ model.layers[0].weight.T + model.layers[0].bias)
    assert_near(jax.tree.leaves(eqx.filter_grad(loss)(other)), jax.tree.leaves(eqx.filter_grad(want)(other)))
    gradient = nnx.grad(lambda m: sum(map(jnp.sum, products(m, x))))(linear)
    assert_near(jax.tree.leaves(gradient)[1], jnp.full((4, 4), 3.0))


# ------------------------------------------------------------------------------------------------ messages


def line(e):
    return str(e.value).split("\n")


def test_nothing_found():
    def f(x):
        return jnp.sin(x)

    with pytest.raises(fg.OptionError) as e:
        fg.patch(f, where="block_*", replace=0.0)(1.0)
    first_line = f.__code__.co_firstlineno
    assert line(e) == [
        "patch found nothing in f that where='block_*' selects.",
        f"  at      {__file__}:{first_line} (f)",
        "  try     print(fg.trace(f, ...)) shows its scopes and primitives",
    ]
    assert isinstance(e.value, ValueError)
    with pytest.raises(fg.OptionError, match="patch found nothing in f that"):
        fg.patch(fg.trace(f, 1.0), where=fg.op("cos"), replace=0.0)
    with pytest.raises(fg.OptionError, match=re.escape("f that where=op('cos', 'tanh') selects")):
        fg.patch(f, where=fg.op("tanh", lax.cos_p), replace=0.0)(1.0)


@pytest.mark.parametrize("verb", [fg.tap, lambda f, where: fg.patch(f, where=where, replace=0.0)])
def test_what_is_no_function(verb):
    with pytest.raises(fg.ArgumentError, match="takes a function or a Graph, and got int"):
        verb(3, where="a")


def test_a_graph_that_was_traced_with_64_bits_in_part():
    def f(x):
        with jax.enable_x64(True):
            with scope("wide"):
                y = lax.convert_element_type(jnp.sin(x), jnp.float64) * np.float64(3)
            return lax.convert_element_type(y, jnp.float32)

    for where in ("wide", fg.op("mul")):
        for form in FORMS:
            got = fg.patch(form_of(f, form, X), where=where, replace=lambda y: y * 2)(X)
            assert_near(got, 6 * jnp.sin(X))


@pytest.mark.parametrize(
    ("replace", "returned"),
    [
        (jnp.zeros(3), "float32[3]"),
        (lambda v: v[0], "float32[]"),
        (lambda v: v.astype(jnp.bfloat16), "bfloat16[4]"),
        (lambda v: (v, v), "float32[4], float32[4]"),
        (lambda v: None, "nothing"),
        ("zero", "str"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_replacements_of_another_type(replace, returned, form):
    def f(x):
        with scope("a"):
            y = jnp.sin(x)
        return y + 1

    for where in ("a", SIN):
        with pytest.raises(fg.GraphError) as e:
            fg.patch(form_of(f, form, X), where=where, replace=replace)(X)
        head, *at, hint = line(e)
        assert head == f"replace= for a/sin returned {returned} for float32[4]."
        if where == "a" or form == "function":  # else the line of whoever traced jnp.sin first
            assert re.fullmatch(rf"  at      {re.escape(__file__)}:\d+ \(.*f\)", at[0])
        assert hint == "  try     return as many values as the equation has outputs, of their shapes and dtypes"


def test_replacements_of_several_values():
    f = lambda x: lax.top_k(x, 2)
    got = fg.patch(f, where=fg.op("top_k"), replace=lambda v, i: (v * 2, i))(X)
    assert_near(got, [2 * f(X)[0], f(X)[1]])
    got = fg.patch(f, where=fg.op("top_k"), replace=(jnp.zeros(2), jnp.zeros(2, jnp.int32)))(X)
    assert_near(got, [jnp.zeros(2), jnp.zeros(2, jnp.int32)])
    with pytest.raises(
        fg.GraphError, match=re.escape("replace= for top_k returned float32[2] for float32[2], int32[2].")
    ):
        fg.patch(f, where=fg.op("top_k"), replace=lambda v, i: v)(X)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, lambda f: lambda x: jax.vmap(f)(x[None])])
@pytest.mark.parametrize("inside", ["custom_jvp", "custom_vjp", "shard_map"])
def test_a_function_with_its_own_derivative_that_calls_another(inside, transform):
    mesh = jax.make_mesh((1,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:1])
    square = {"custom_jvp": jax.custom_jvp(jnp.square), "custom_vjp": jax.custom_vjp(jnp.square)}.get(inside)
    if inside == "custom_jvp":
        square.defjvp(lambda primals, tangents: (primals[0] ** 2, 2 * primals[0] * tangents[0]))
    elif inside == "custom_vjp":
        square.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * x * ct,))
    else:
        square = jax.shard_map(jnp.square, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())

    @jax.custom_jvp
    def outer(x):
        return jnp.sin(square(x))

    outer.defjvp(lambda primals, tangents: (outer(*primals), jnp.cos(primals[0] ** 2) * 2 * primals[0] * tangents[0]))
    sines = []

    def f(x):
        out, seen = fg.tap(lambda x: outer(x).sum(), where=fg.op("sin"))(x)
        sines.append(list(seen))
        return out

    x = jnp.float32(0.5)
    np.testing.assert_allclose(transform(f)(x), transform(lambda x: outer(x).sum())(x), rtol=1e-6)
    assert all(names in (["sin#0"], []) for names in sines)
    assert sines
