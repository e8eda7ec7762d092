"""`python -m benchmarks --check`: whatever has a bound on its time, held against `bounds.BOUNDS`.

Ways take turns in one process; imports and examples have their own. A page is timed where Chromium and selenium are there.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from funcgrad.transforms.cost import device
from jax import lax
from jax.extend.core import jaxpr_as_fun

import funcgrad as fg
from tests import trainings
from tests.funcgrad.viewing import test_viewer as viewer
from tests.transforms.rewriting.test_replace import attention, transformer

from . import dispatch, gradients, recording, rewriting
from .bounds import figure
from .interleaving import Figure, interleaved, ratio

ROUNDS = 3
ROOT = Path(__file__).parent.parent


def figures(quick: bool) -> Iterator[Figure]:
    for part in (gradients, dispatch, rewriting, recording):
        yield from part.figures(part.run(quick))
    for rows in (large_graphs, long_bodies, devices, kernels, studies):
        yield from itertools.starmap(figure, rows(quick))
    if not quick:
        for rows in (processes, pages):
            yield from itertools.starmap(figure, rows())


def beside(way: Callable[[], Any], reference: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The ratio of CPU seconds."""
    return ratio(*interleaved(way, reference, rounds=rounds, least=1).cpu_s)


def chain(f: Callable, equations: int) -> Callable:
    def program(x):
        for _ in range(equations // 2):
            x = f(x)
        return x

    return program


def retraced(graph: fg.Graph) -> Callable[[], Any]:
    """JAX's own way through a graph."""
    return lambda: jax.make_jaxpr(jaxpr_as_fun(graph.jaxpr))(*graph.in_avals)


def large_graphs(quick: bool) -> Iterator[tuple[str, float]]:
    equations, rounds = (200, 1) if quick else (10_000, ROUNDS)
    sums = fg.trace(chain(lambda x: lax.add(lax.sin(x), x), equations), 1.0)
    replaced = lambda: fg.replace(sums, lambda a, b: jnp.sin(a) + b, lambda a, b: a - b)
    yield "replace 5,000 matches in 10,000 equations / a trace", beside(replaced, retraced(sums), rounds)

    f, args = transformer(2 if quick else 12)
    layers = fg.trace(f, *args)
    replaced = lambda: fg.replace(layers, attention, jax.nn.dot_product_attention)
    yield "replace the attention of 12 layers / a trace", beside(replaced, retraced(layers), rounds)

    x = jnp.ones((4, 8))
    products = fg.trace(chain(lambda x: jnp.sin(x) * x, equations), x)

    def cost():
        table = fg.cost(products)
        str(table), table.timeline(), table.dict()

    name = "cost of 10,000 equations with text and timeline / a trace"
    yield name, beside(cost, retraced(products), rounds)
    name = "temporaries of 10,000 equations / a trace"
    tables = iter([fg.cost(products) for _ in range(rounds)])  # each computes them once
    yield name, beside(lambda: next(tables).temp_bytes, retraced(products), rounds)

    def loss(ws, x):
        for k, w in enumerate(ws):
            x = x + jnp.tanh(x @ w)
            x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
            x = jnp.where(x > 1e9, x, x - x) if k == 3 else x
        return x.sum()

    gradient, args = jax.jit(jax.grad(loss)), (jnp.ones((5 if quick else 40, 8, 8)), jnp.ones((16, 8)))
    jax.block_until_ready(gradient(*args))
    trace = lambda: jax.jit(jax.grad(lambda ws, x: loss(ws, x))).trace(*args)
    yield "nan_origin in 1,000 equations / a trace", beside(lambda: fg.nan_origin(gradient, *args), trace, rounds)


def long_bodies(quick: bool) -> Iterator[tuple[str, float]]:
    """How the time to cut a body into what is kept and what is computed again grows: linearly."""

    def traced(lines):
        def body(x, y):
            for _ in range(lines):
                x, y = x * (y + 0.5), y - x * 0.01
            return x, y

        f = lambda x, n: lax.fori_loop(0, n, lambda _, c: body(*c), (x, x))[0]
        return jax.jit(fg.grad(f)).trace(1.0, 3)

    few_lines, many_lines = (10, 60) if quick else (80, 480)
    traced(few_lines)
    yield (
        "gradient of a loop of 480 lines / one of 80 lines",
        beside(lambda: traced(many_lines), lambda: traced(few_lines)),
    )


def devices(quick: bool) -> Iterator[tuple[str, float]]:
    a = jnp.ones((1024, 1024))
    product = jax.jit(jnp.dot).lower(a, a).compile()
    took_s = interleaved(lambda: product(a, a).block_until_ready(), rounds=5).wall_s.min()
    yield "fg.machine: FLOP/s / those of a product", fg.machine().flops_per_s * took_s / (2 * 1024**3)
    device.cache_bytes.cache_clear()
    start_s = time.perf_counter()
    device.cache_bytes()
    yield "the size of the caches: seconds to measure it", time.perf_counter() - start_s


def kernels(quick: bool) -> Iterator[tuple[str, float]]:
    w, x = jnp.eye(64) / 2, jnp.ones((32, 64))
    looped = lambda w, x: jnp.sum(lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0])
    compiled = fg.compiled(looped, w, x)
    (product,) = (kernel for kernel in compiled.kernels if kernel.kind == "matmul")
    name = "compiled: time of a loop's product / that of the program"
    yield name, product.elapsed_s / compiled.elapsed_s

    models = (trainings.mlp,) if quick else (trainings.mlp, trainings.transformer, trainings.lstm, trainings.resnet)
    known_s = total_s = 0.0
    for model in models:
        loss, types = model(lambda layer: layer)
        args = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), types)
        for kernel in fg.compiled(jax.grad(loss), *args).kernels:
            total_s += kernel.elapsed_s or 0
            known_s += (kernel.elapsed_s or 0) * bool(kernel.equations)
    yield "compiled: part of the time in kernels with equations", known_s / total_s


def studies(quick: bool) -> Iterator[tuple[str, float]]:
    times = fg.study(lambda x: jnp.sum(jnp.sin(x) * 2), jnp.ones((3, 4))).times
    yield "study: first call / a compiled call", times.first_s / times.compiled_s


IMPORTS = """
import time
start_s = time.process_time()
import jax
between_s = time.process_time()
import funcgrad
print((time.process_time() - between_s) / (between_s - start_s))
"""


def processes() -> Iterator[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:

        def output(*command: str) -> str:
            environment = os.environ | {"PYTHONPYCACHEPREFIX": folder, "PYTHONPATH": str(ROOT)}
            command = (sys.executable, *command)
            return subprocess.run(
                command, cwd=folder, env=environment, check=True, capture_output=True, text=True
            ).stdout

        # The least: whatever else runs only adds.
        yield "import of funcgrad / that of jax", min(float(output("-c", IMPORTS)) for _ in range(5))
        for name in ("digits", "adaptive_ode", "charlm", "budget"):
            start_s = time.perf_counter()
            output(str(ROOT / "examples" / f"{name}.py"))
            yield f"examples/{name}.py: seconds", time.perf_counter() - start_s


def pages() -> Iterator[tuple[str, float]]:
    driver = viewer.browser()
    if driver is None:
        return
    page, array = viewer.Page(driver), viewer.array
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"

        def elapsed_s(action):
            start_s = time.perf_counter()
            action()
            page.js("return 0")
            return time.perf_counter() - start_s

        gradient = lambda blocks: fg.grad(fg.trace(viewer.transformer, viewer.weights(blocks), array(4, 32, 64)))
        small, large = gradient(2), gradient(68)
        name = "page of 300 equations: seconds to "
        yield f"{name}open", min(page.open(small, path).opening_s for _ in range(ROUNDS))
        yield f"{name}unfold", elapsed_s(page.element("#unfold").click)
        name = "page of 10,000 equations: seconds "
        yield f"{name}to open", page.open(large, path).opening_s
        actions = (
            lambda: page.js("toggle(nodes.find((n) => n.label === 'block_3'))"),
            lambda: page.js("search('block_5/ tanh')"),
            lambda: page.js("nextMatch(1)"),
            lambda: page.js("zoom(1.2)"),
            lambda: page.press("t"),
        )
        yield f"{name}of the slowest action", max(map(elapsed_s, actions))
        page.press("t")
        yield f"{name}to unfold what fits", elapsed_s(lambda: page.js("unfold(OPEN_AT_MOST); draw()"))
    driver.quit()
