"""Gradients within a memory budget, compared with handwritten uses of `jax.checkpoint`, on six models.

The handwritten variants are: no remat; remat of every layer; policies that save all products, or all products except
those of attention; and segments of layers or scan steps, of several lengths. The budgets are fractions of the
temporaries without remat, and the temporaries of each handwritten variant. FLOPs are compared with the variant that
fits the budget with the fewest FLOPs, times with the fastest variant that fits. On a GPU, the models are larger.
"""

from __future__ import annotations

import itertools
import math
import time
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
LARGE: dict[str, dict[str, int]] = {  # sizes that keep a GPU busy
    "MLP, 32 layers": {"width": 4096, "batch": 8192},
    "transformer, 6 layers": {"width": 1024, "heads": 16, "time": 1024, "batch": 8},
    "GPT, scan over 12 layers": {"width": 768, "heads": 12, "time": 1024, "batch": 8},
    "ResNet, 8 blocks": {"channels": 64, "size": 64, "batch": 128},
    "U-Net": {"channels": 32, "size": 256, "batch": 8},
    "LSTM, 200 steps": {"width": 1024, "batch": 256},
}
SMALLEST = "smallest by hand"
FORMS = "MLP", "transformer", "GPT"  # those that the figures for FLOPs are of


class Way(NamedTuple):
    """A handwritten gradient, compiled."""

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
    """Random arguments of the given shapes."""
    rng = np.random.default_rng(0)
    draw = lambda a: rng.normal(size=a.shape) * 0.05 if a.dtype == jnp.float32 else rng.integers(0, 10, a.shape)
    return jax.tree.map(lambda a: jnp.asarray(draw(a), a.dtype), args)


def rnn(wrap: trainings.Wrap, segment: int = 1) -> tuple[Callable, tuple]:
    """A small program that compiles fast."""
    step = lambda w, carry, x: (jnp.tanh(carry @ w) + x, None)
    loss = lambda w, xs: jnp.sum(trainings.scanned(wrap, step, w, xs[0], xs, segment)[0] ** 2)
    return loss, (trainings.array(16, 16), trainings.array(12, 8, 16))


def run(quick: bool) -> list[dict[str, Any]]:
    if quick:
        return list(measured("RNN, 12 steps", rnn, (), (0.75,), quick=True))
    large = LARGE if jax.default_backend() == "gpu" else {}
    return [
        row
        for name, (make, sizes, segments) in MODELS.items()
        for row in measured(name, partial(make, **sizes | large.get(name, {})), segments, PARTS)
    ]


def measured(
    name: str, make: Callable, segments: tuple[int, ...], parts: tuple[float, ...], quick: bool = False
) -> Iterator[dict[str, Any]]:
    """One row per budget, and one row for the smallest programs. Missing figures are NaN. `quick`: two handwritten variants."""
    loss, args = make(lambda layer: layer)
    ways = [
        compiled(way, *program) for way, *program in itertools.islice(by_hand(make, segments), 2 if quick else None)
    ]
    default, values = ways[0], arrays(args)
    budgets = {part: math.floor(part * default.bytes) for part in parts}
    if not quick:
        budgets |= {w.bytes / default.bytes: w.bytes for w in ways if w.bytes <= default.bytes / 2}
    for part, size in sorted(budgets.items(), reverse=True):
        start_s = time.perf_counter()
        plan = planned(loss, args, size)
        row = dict.fromkeys(COLUMNS, math.nan) | {"model": name, "budget": part, "MiB": size / MIB, "hand": "none fits"}
        row["plan_s"] = time.perf_counter() - start_s
        fitting = [w for w in ways if w.bytes <= size]
        if fitting:
            best = min(fitting, key=lambda w: w.flops)
            row |= {"hand": best.name, "hand_MiB": best.bytes / MIB, "hand_flops": best.flops / default.flops - 1}
        if isinstance(plan, fg.BudgetError):
            yield row | {"MiB_used": plan.smallest / MIB, "flops": math.inf, "time": math.inf}
            continue
        row |= {"MiB_used": plan.compiled_bytes / MIB, "flops": plan.extra_flops}
        if fitting:
            # Of those by hand that fit, the fastest is not always the one with the fewest FLOPs.
            leaves, ours = jax.tree.leaves(values), jax.jit(plan.graph)
            runs = [lambda: ours(*leaves), *(lambda w=w: w.run(*values) for w in fitting)]
            calls = [lambda call=call: jax.block_until_ready(call()) for call in runs]
            for compiling in calls:
                compiling()
            wall = interleaved(*calls, rounds=3 if quick else 7, within_s=30.0).wall_s
            row["time"] = ratio(wall[0], min(wall[1:], key=np.median))
        yield row
    if quick:
        return
    least, ours = min(w.bytes for w in ways), planned(loss, args, 1).smallest
    empty = dict.fromkeys(COLUMNS, math.nan) | {"model": name, "hand": SMALLEST}
    yield empty | {"budget": ours / default.bytes, "MiB": ours / MIB, "hand_MiB": least / MIB, "MiB_used": ours / MIB}


def planned(loss: Callable, args: tuple, size: int) -> Any:
    """The plan, or the error with the smallest budget."""
    try:
        return fg.plan(loss, *args, memory=size)
    except fg.BudgetError as error:
        return error


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    targets = []
    smaller = [row["MiB_used"] < row["hand_MiB"] for row in rows if row["hand"] == SMALLEST]
    for row in rows:
        name = f"{row['model']} in {row['budget']:.0%}"
        if not math.isnan(row["hand_flops"]):
            targets.append(
                Figure(f"{name}: FLOPs / FLOPs by hand", (1 + row["flops"]) / (1 + row["hand_flops"]), most=1.0)
            )
            targets.append(Figure(f"{name}: time / time by hand", row["time"], most=1.03))
        if row["budget"] in MOST and row["model"].startswith(FORMS):
            targets.append(Figure(f"{name}: extra FLOPs", row["flops"], most=MOST[row["budget"]]))
    return [*targets, Figure("models with a smaller program than by hand", sum(smaller), least=min(4, len(smaller)))]
