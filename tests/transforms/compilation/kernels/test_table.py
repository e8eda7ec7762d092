"""`compiled`: the kernels of XLA's program and the equations in them, compared with what XLA says of the plain program."""

from __future__ import annotations

import collections
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.compilation.kernels.hlo import parse
from jax import lax

import funcgrad as fg

from .... import trainings
from ....checks import options, raised_by, summed
from ....corpus import CORPUS

pytestmark = pytest.mark.optimized
W = jnp.linspace(-1, 1, 64 * 64).reshape(64, 64)
X = jnp.linspace(0, 1, 32 * 64).reshape(32, 64)


def layers(w, x):
    with jax.named_scope("first"):
        x = jax.nn.gelu(x @ w)
    with jax.named_scope("second"):
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


def looped(w, x):
    return jnp.sum(lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0])


def operations(k):
    return [str(row.eqn.primitive) for row in k.equations]


# The program


@pytest.mark.parametrize("f", [layers, jax.grad(looped)])
def test_scopes_change_nothing_that_xla_does(f):
    c, plain = fg.compiled(f, W, X), jax.jit(f).lower(W, X).compile()
    opcodes = lambda text: collections.Counter(i.opcode for i in parse(text).by_name.values())
    assert opcodes(c.hlo()) == opcodes(plain.as_text())
    analysis = plain.memory_analysis()
    assert c.memory.temp_bytes == analysis.temp_size_in_bytes
    assert c.memory.argument_bytes == analysis.argument_size_in_bytes == W.nbytes + X.nbytes
    assert c.memory.output_bytes == analysis.output_size_in_bytes


def test_each_product_is_a_kernel_in_its_scope():
    c = fg.compiled(jax.grad(layers), W, X)
    products = [k for k in c.kernels if k.kind == "matmul"]
    assert len(products) == sum(
        str(eqn.primitive) == "dot_general" for _, eqn in fg.walk(fg.trace(jax.grad(layers), W, X))
    )
    assert all("dot_general" in operations(k) for k in products)
    assert sum(k.work.flops for k in products) == len(products) * 2 * 32 * 64 * 64
    scopes = [next(row.path for row in k.equations if str(row.eqn.primitive) == "dot_general") for k in products]
    assert {scope[-1] for scope in scopes} == {"first", "second"}
    assert {scope[0] == "transpose" for scope in scopes} == {True, False}
    assert all("test_table.py" in k.lines[0] for k in products)


def test_a_loop_counts_as_often_as_it_runs():
    (k,) = (k for k in fg.compiled(looped, W, X).kernels if k.kind == "matmul")
    assert k.times == 7
    assert k.work.flops == 7 * 2 * 32 * 64 * 64
    f = lambda x, n: lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ W), x)
    (k,) = (k for k in fg.compiled(f, X, 3).kernels if k.kind == "matmul")
    assert k.times is None
    assert k.work.flops == 2 * 32 * 64 * 64


KEY = jax.random.key(0)
CONV = (jnp.ones((2, 3, 8, 8)), jnp.ones((4, 3, 3, 3)))


@pytest.mark.parametrize(
    ("f", "args"),
    [
        (lambda k, x: jnp.where(jax.random.bernoulli(k, 0.5, x.shape), x, 0.0), (KEY, X)),
        (lambda k: jax.random.permutation(k, 100), (KEY,)),
        (jax.random.split, (KEY,)),
        (jnp.cumsum, (jnp.ones(1000),)),
        (lambda w, v: jnp.tanh(w @ v), (W, X[0])),
        (lambda x, k: lax.conv(x, k, (1, 1), "SAME"), CONV),
        (jax.grad(looped), (W, X)),
        (jax.grad(lambda x, k: jnp.sum(lax.conv(x, k, (1, 1), "SAME") ** 2)), CONV),
        (jax.grad(layers), (W, X)),
    ],
    ids=["dropout", "permutation", "split", "cumsum", "matvec", "conv", "scan", "grad_conv", "layers"],
)
def test_the_work_of_the_kernels_is_that_of_the_program(f, args):
    """But for what vanished, or was added; each product has its own."""
    c, cost = fg.compiled(f, *args), fg.cost(f, *args)
    flops = sum(k.work.flops for k in c.kernels)
    assert flops <= 1.001 * cost.flops
    heavy = [row for row in cost.rows if str(row.eqn.primitive) in ("dot_general", "conv_general_dilated")]
    products = [k for k in c.kernels if k.kind in ("matmul", "convolution")]
    assert sum(k.work.flops for k in products) >= 0.999 * sum(row.work.flops for row in heavy)
    assert all(k.work.flops > 0 for k in products)
    assert not any(k.is_added for k in products)
    assert not any(k.work.flops for k in c.kernels if k.kind == "copy")


def test_bytes_of_a_slice_and_of_an_update():
    big = jnp.zeros((1000, 64))
    (k,) = (
        k
        for k in fg.compiled(lambda x, k: jnp.sin(lax.dynamic_slice_in_dim(x, k, 2)) * 3, big, 5).kernels
        if k.equations
    )
    assert k.work.bytes_written == 2 * 64 * 4
    assert k.work.bytes_read < 3 * 64 * 4
    c = fg.compiled(fg.jit(lambda x, y: x.at[3].set(jnp.sin(y)), donate_argnums=0), big, X[0])
    assert sum(k.work.bytes for k in c.kernels) < 10 * 64 * 4
    assert c.memory.alias_bytes == big.nbytes
    assert not big.is_deleted()


def test_what_vanished():
    f = lambda x: (jnp.sin(x) + jnp.sin(x) + 0 * jnp.cos(2.0), jnp.exp(x * 1))[0]
    c = fg.compiled(f, X)
    names = [str(row.eqn.primitive) for row in c.vanished]
    assert "exp" in names
    assert "cos" in names
    assert names.count("sin") == 1
    assert all("test_table.py" in row.line for row in c.vanished)


def test_times():
    c = fg.compiled(looped, W, X)
    assert c.is_measured
    (k,) = (k for k in c.kernels if k.kind == "matmul")
    assert k.elapsed_s > 0
    assert 0 < k.share(fg.Machine("here", 1e12, 1e12)) < k.share(fg.Machine("slower", 1e9, 1e9))
    assert c.times["dot_general#0"] > 0
    assert sum(c.times.values()) == pytest.approx(sum(k.elapsed_s or 0 for k in c.kernels))


@pytest.mark.parametrize("name", ["custom_jvp_in_loops", "branches_in_loops"])
def test_times_have_the_names_of_the_equations(name):
    p = next((p for p in CORPUS if p.name == name), CORPUS[0])
    graph = fg.trace(p.f, *p.args)
    nodes = {n["name"]: n for n in json.loads(graph.to_json())["nodes"] if n["kind"] == "equation"}
    c = fg.compiled(graph, *p.args)
    for kernel in c.kernels:
        assert not kernel.elapsed_s or kernel.equations
    assert c.times.keys() <= nodes.keys()
    assert all(nodes[key]["primitive"] == key.rpartition("/")[2].partition("#")[0] for key in c.times)


def test_kernels_are_shown_beside_the_graph(tmp_path):
    graph = fg.trace(jax.grad(layers), W, X)
    c = fg.compiled(graph, W, X)
    assert '"time_s":null' in fg.show(graph, tmp_path / "a.html").read_text()
    page = fg.show(graph, tmp_path / "b.html", kernels=c).read_text()
    assert all(f'"time_s":{seconds}' in page for seconds in c.times.values())
    assert all(f'"{k.name}: {k.sort}' in page for k in c.kernels)
    assert {id(k) for parts in c.parts.values() for k in parts} == {id(k) for k in c.kernels if k.equations}
    with pytest.raises(fg.ArgumentError, match="Graph"):
        fg.show(graph, tmp_path / "c.html", kernels=graph)
    with pytest.raises(fg.OptionError, match="kernels"):
        fg.show(fg.trace(jnp.sin, X), tmp_path / "c.html", kernels=fg.compiled(graph))


def test_types_are_compiled_and_not_run():
    ran = []
    f = lambda x: (jax.debug.callback(ran.append, x[0, 0]), jnp.sin(x))[1]
    c = fg.compiled(f, jax.ShapeDtypeStruct((4, 4), jnp.float32))
    graph = fg.compiled(fg.trace(jnp.sin, X))
    assert c.elapsed_s is None is graph.elapsed_s
    assert not c.is_measured
    assert not ran
    assert not graph.is_measured
    assert operations(graph.kernels[0]) == ["sin"]
    assert not c.times


def test_text_and_dict():
    c = fg.compiled(layers, W, X)
    head, memory, *rows = str(c).splitlines()
    assert head.startswith(f"layers: {len(c.kernels)} kernels, ")
    assert memory.startswith("24.0 KiB of arguments, 4 B of results (0 B written over arguments), ")
    assert any("matmul" in row and "dot_general" in row and "second" in row for row in rows)
    assert "of roofline" in c.text(machine=fg.Machine("here", 1e10, 1e10))
    assert len(c.text(lines=1).splitlines()) < len(str(c).splitlines())
    assert repr(c).startswith("Compiled(layers: ")
    plain = c.dict()
    assert [k["name"] for k in plain["kernels"]] == [k.name for k in c.kernels]
    assert plain["memory"]["argument_bytes"] == 24 * 1024
    assert "HloModule" in c.hlo()


def test_what_is_no_function_is_refused():
    assert isinstance(raised_by(lambda: fg.compiled(3)), fg.ArgumentError)


# How much of a program is known


@pytest.mark.slow
def test_most_kernels_have_equations():
    """At least 85 % of the kernels have equations, and 80 % have instructions of their own."""
    kernels, models = (
        [],
        [trainings.mlp, trainings.transformer, trainings.gpt, trainings.lstm, trainings.resnet, trainings.unet],
    )
    for p in CORPUS:
        kernels += fg.compiled(p.f, *p.args).kernels
        if "grad" not in p.lacks:
            kernels += fg.compiled(jax.grad(summed(p.f), **options(p)), *p.args).kernels
    of_models = []
    for make in models:
        loss, args = make(lambda layer: layer)
        of_models += fg.compiled(jax.grad(loss), *jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), args)).kernels
    for group in (kernels, of_models):
        assert sum(not k.is_added for k in group) >= 0.8 * len(group)
        assert sum(bool(k.equations) for k in group) >= 0.85 * len(group)


def test_one_profiler_serves_all_threads_and_the_user(tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fg.compiled(jnp.sin, X))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(c.is_measured for c in results)
    with jax.profiler.trace(str(tmp_path)):
        c = fg.compiled(jnp.sin, X)
    assert not c.is_measured
    assert c.elapsed_s > 0
