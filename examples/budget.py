"""A transformer of 24 layers that trains with a quarter of the memory that its gradient takes by default.

    pip install -e '.[examples]' && python examples/budget.py [picture.png]

It prints a timeline of the memory, the plan for the budget, and the log of the training. The picture shows memory against time
for hand-written policies of `jax.checkpoint` and for budgets. It runs for some minutes on a CPU, mostly to compile programs of
24 layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcgrad as fg
from funcgrad import nn

LAYERS, FEATURES, HEADS, CONTEXT, BATCH, VOCABULARY = 24, 64, 4, 64, 16, 64
BUDGET, BUDGETS, STEPS, TIMED = "25%", ("25%", "10%"), 40, 5
MIB = 2**20
POLICIES: dict[str, Callable] = {
    "no remat": lambda layer: layer,
    "each layer": jax.checkpoint,
    "dots_saveable": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "dots_with_no_batch_dims": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}
BLOCK = nn.serial(
    nn.residual(nn.layer_norm(), nn.attention(HEADS, causal=True)),
    nn.residual(nn.layer_norm(), nn.dense(4 * FEATURES), jax.nn.gelu, nn.dense(FEATURES)),
)


def params_of(key: jax.Array) -> dict[str, Any]:
    x = jnp.zeros((1, CONTEXT, FEATURES))
    keys = jax.random.split(key, LAYERS + 1)
    return {
        "embedding": 0.02 * jax.random.normal(keys[-1], (VOCABULARY, FEATURES)),
        "blocks": [BLOCK.init(key, x)[0] for key in keys[:-1]],
    }


def loss_of(wrap: Callable) -> Callable:
    """The loss of text int32[batch, time + 1]; `wrap` is applied to each layer."""
    layer = wrap(lambda params, x: BLOCK(params, x))

    def loss(params, text):
        x = params["embedding"][text[:, :-1]]
        for p in params["blocks"]:
            x = layer(p, x)
        logits = x @ params["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    return loss


def text_of(seed: int) -> np.ndarray:
    """Windows of a text in which each character determines the next one, with some noise."""
    rng = np.random.default_rng(seed)
    text = np.empty((BATCH, CONTEXT + 1), np.int32)
    text[:, 0] = rng.integers(0, VOCABULARY, BATCH)
    for k in range(CONTEXT):
        is_noise, noise = rng.random(BATCH) < 0.1, rng.integers(0, VOCABULARY, BATCH)
        text[:, k + 1] = np.where(is_noise, noise, (5 * text[:, k] + 3) % VOCABULARY)
    return text


def milliseconds(gradient: Callable, *args: Any) -> float:
    jax.block_until_ready(gradient(*args))
    calls_s = []
    for _ in range(TIMED):
        start_s = time.perf_counter()
        jax.block_until_ready(gradient(*args))
        calls_s.append(time.perf_counter() - start_s)
    return 1e3 * min(calls_s)


def measured(params: Any, text: np.ndarray, plans: dict[str, fg.Plan]) -> dict[str, list[tuple[str, float, float]]]:
    """(name, MiB of temporaries, ms) of each policy and each budget; `plans` holds plans made before."""
    points: dict[str, list[tuple[str, float, float]]] = {"by hand": [], "by budget": []}
    for name, wrap in POLICIES.items():
        gradient = jax.jit(jax.value_and_grad(loss_of(wrap)))
        size = gradient.lower(params, text).compile().memory_analysis().temp_size_in_bytes
        points["by hand"].append((name, size / MIB, milliseconds(gradient, params, text)))
    loss = loss_of(lambda layer: layer)
    for memory in BUDGETS:
        try:
            plan = plans.get(memory) or fg.plan(loss, params, text, memory=memory)
        except fg.BudgetError as error:
            print(error)
            continue
        ms = milliseconds(fg.jit(plan.graph), *jax.tree.leaves((params, text)))
        points["by budget"].append((memory, plan.compiled_bytes / MIB, ms))
    return points


def draw(points: dict[str, list[tuple[str, float, float]]], path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        raise fg.MissingExtra("this example draws with matplotlib.", hint="pip install 'funcgrad[examples]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (kind, kind_points), style in zip(points.items(), ("o", "s-"), strict=True):
        names, sizes, times = zip(*sorted(kind_points, key=lambda p: p[1]), strict=True)
        axes.plot(sizes, times, style, label=kind)
        for k, (name, x, y) in enumerate(zip(names, sizes, times, strict=True)):
            is_below = kind == "by budget" or k % 2
            axes.annotate(name, (x, y), xytext=(5, -12 if is_below else 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="temporaries of the gradient, MiB", ylabel="ms per gradient", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"A transformer of {LAYERS} layers, batch {BATCH}")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")  # includes labels beyond the right edge


def main(path: str = "budget.png") -> float:
    params, text = params_of(jax.random.key(0)), text_of(0)
    loss = loss_of(lambda layer: layer)
    print(fg.cost(fg.value_and_grad(loss), params, text).timeline().text(lines=6), "\n")
    plan = fg.plan(loss, params, text, memory=BUDGET)
    print(plan.text(lines=6), "\n")

    update = fg.step(loss, optax.adam(1e-3), memory=BUDGET)
    _, log = fg.train(update, update.init(params), map(text_of, range(STEPS)), steps=STEPS)
    print(log, "\n")

    points = measured(params, text, {BUDGET: plan})
    for kind, kind_points in points.items():
        for name, size, ms in kind_points:
            print(f"{kind:9}  {name:24} {size:8.1f} MiB {ms:8.1f} ms")
    draw(points, path)
    print(path)
    return float(log.metrics["loss"][-1])


if __name__ == "__main__":
    main(*sys.argv[1:2])
