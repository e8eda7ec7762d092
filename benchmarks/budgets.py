"""Gradients within a budget, beside what one writes by hand with `jax.checkpoint`, on six models.

By hand are no remat, every layer, products, all products but attention's, and segments of layers or steps of a scan, each at every
length. Budgets are halves and so on of what no remat takes, and what each way by hand takes; ours is held against the way
that costs the fewest FLOPs among those by hand that fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import funcgrad as fg
from tests import trainings

from .interleaving import Figure, interleaved, ratio

COLUMNS = {
    "model": "",
    "budget": ".0%",
    "MiB": ".1f",
    "hand": "",
    "hand_MiB": ".1f",
    "hand_flops": "+.1%",
    "MiB_used": ".1f",
    "flops": "+.1%",
    "time": ".3f",
    "plan_s": ".1f",
}
PARTS = 0.5, 0.35, 0.25
MOST = {0.5: 0.01, 0.35: 0.05, 0.25: 0.12}  # extra FLOPs of MLP and transformers
MIB = 2**20
MODELS: dict[str, tuple[Callable, dict[str, int], tuple[int, ...]]] = {  # sizes, and segments by hand
    "MLP, 32 layers": (trainings.mlp, {"depth": 32}, (2, 4, 8, 16)),
    "transformer, 6 layers": (trainings.transformer, {"depth": 6}, (2, 3)),
    "GPT, scan over 12 layers": (trainings.gpt, {"depth": 12}, (2, 3, 4, 6)),
    "ResNet, 8 blocks": (trainings.resnet, {}, (2, 4)),
    "U-Net": (trainings.unet, {}, ()),
    "LSTM, 200 steps": (trainings.lstm, {}, (4, 8, 20, 50)),
}
FORMS = "MLP", "transformer", "GPT"  # those that the figures for FLOPs are of


class Way(NamedTuple):
    """A gradient by hand, compiled."""

    name: str
    bytes: int
    flops: float
    run: Callable


def by_hand(make: Callable, segments: tuple[int, ...]) -> Iterator[tuple[str, Callable, tuple]]:
    policies = jax.checkpoint_policies
    wraps: dict[str, Callable] = {
        "no remat": lambda layer: layer,
        "each layer": jax.checkpoint,
        "dots_saveable": partial(jax.checkpoint, policy=policies.dots_saveable),
        "dots_with_no_batch_dims_saveable": partial(jax.checkpoint, policy=policies.dots_with_no_batch_dims_saveable),
        "products and convolutions": partial(jax.checkpoint, policy=trainings.products),
    }
    for name, wrap in wraps.items():
        yield name, *make(wrap)
    for length in segments:
        yield f"segments of {length}", *make(jax.checkpoint, segment=length)


def compiled(name: str, loss: Callable, args: tuple) -> Way:
    gradient = jax.jit(jax.value_and_grad(loss))
    size = gradient.lower(*args).compile().memory_analysis().temp_size_in_bytes
    return Way(name, size, fg.cost(jax.value_and_grad(loss), *args).flops, gradient)


def arrays(args: tuple) -> tuple:
    """Arguments of these shapes, without a meaning."""
    rng = np.random.default_rng(0)
    draw = lambda a: rng.normal(size=a.shape) * 0.05 if a.dtype == jnp.float32 else rng.integers(0, 10, a.shape)
    return jax.tree.map(lambda a: jnp.asarray(draw(a), a.dtype), args)


def run(quick: bool) -> list[dict[str, Any]]:
    if quick:
        make, segments = partial(trainings.mlp, depth=6, width=32, batch=128), (2,)
        return list(measured("MLP, 6 layers", make, segments, (0.6,), quick=True))
    return [
        row
        for name, (make, sizes, segments) in MODELS.items()
        for row in measured(name, partial(make, **sizes), segments, PARTS)
    ]


def measured(
    name: str, make: Callable, segments: tuple[int, ...], parts: tuple[float, ...], quick: bool = False
) -> Iterator[dict[str, Any]]:
    import time

    loss, args = make(lambda layer: layer)
    ways = [compiled(way, f, a) for way, f, a in by_hand(make, segments)]
    default, values = ways[0], arrays(args)
    budgets = {part: math.floor(part * default.bytes) for part in parts}
    if not quick:
        budgets |= {w.bytes / default.bytes: w.bytes for w in ways if w.bytes <= default.bytes / 2}
    ours: dict[int, Any] = {}
    for part, size in sorted(budgets.items(), reverse=True):
        start_s = time.perf_counter()
        try:
            plan = fg.plan(loss, *args, memory=size)
        except fg.BudgetError as error:
            plan = error
        plan_s = time.perf_counter() - start_s
        best = min((w for w in ways if w.bytes <= size), key=lambda w: w.flops, default=None)
        row = {"model": name, "budget": part, "MiB": size / MIB, "hand": best.name if best else "none fits"}
        row |= {"hand_MiB": best.bytes / MIB if best else math.nan, "plan_s": plan_s}
        row["hand_flops"] = best.flops / default.flops - 1 if best else math.nan
        if isinstance(plan, fg.BudgetError):
            yield row | {"MiB_used": plan.smallest / MIB, "flops": math.inf, "time": math.inf}
            continue
        took = math.nan
        if best and TIMED:
            gradient = jax.jit(lambda *leaves: plan.graph(*leaves))
            leaves = jax.tree.leaves(values)
            two = lambda: jax.block_until_ready(gradient(*leaves)), lambda: jax.block_until_ready(best.run(*values))
            for compiling in two:
                compiling()
            wall = interleaved(*two, rounds=3 if quick else 7, within_s=20.0).wall_s
            took = ratio(wall[0], wall[1])
        yield row | {"MiB_used": plan.compiled_bytes / MIB, "flops": plan.extra_flops, "time": took}
    smallest = min(w.bytes for w in ways)
    try:
        found = fg.plan(loss, *args, memory=1).compiled_bytes
    except fg.BudgetError as error:
        found = error.smallest
    row = {"model": name, "budget": found / default.bytes, "MiB": found / MIB, "hand": "smallest by hand"}
    yield row | {"hand_MiB": smallest / MIB, "hand_flops": math.nan, "MiB_used": found / MIB, "flops": math.nan, "time": math.nan, "plan_s": math.nan}


TIMED = True
