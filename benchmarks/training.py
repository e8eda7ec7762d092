"""Steps per second of `fg.train`, divided by those of a handwritten loop, on four models.

Our variant is a model of `fg.nn` with `fg.step` and `fg.train`. The handwritten variant has the same mathematics and
parameters in plain JAX, with Adam from optax and a donated state. It uses the faster of one step per dispatch and
`lax.scan` over batches that the program stacks. The time includes the other work of `train` (it copies the state,
checks for NaN and chooses the chunk). It excludes compilation.

The memory addresses of arrays and programs make a loop up to 5 % faster or slower, for the whole life of a process. Two
equal handwritten loops differ in the same way, and the first one is usually faster. So each row is the median over
several processes, and our variant is the first one in every second process.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import funcgrad as fg

from .interleaving import Figure, interleaved, ratio
from .models import MODELS

COLUMNS = {
    "model": "",
    "batches": "",
    "chunk": "",
    "steps": "d",
    "hand_per_s": ".1f",
    "funcgrad_per_s": ".1f",
    "ratio": ".3f",
    "ratio_cpu": ".3f",
}
LEAST = 0.98
PROCESSES, ROUNDS, WITHIN_S = 6, 7, 10.0  # each row has so many rounds in each process
OPTIMIZER = optax.adam(1e-3)


def loss_of(model: Callable) -> Callable:
    def loss(params, batch):
        x, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(model(params, x), labels).mean()

    return loss


class ByHand:
    """A handwritten training loop in JAX."""

    def __init__(self, loss: Callable, params: Any):
        def one(state, batch):
            params, opt_state = state
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        def steps(state, batches):
            return lax.scan(one, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))

        self.one, self.many = jax.jit(one, donate_argnums=0), jax.jit(steps, donate_argnums=0)
        self.state = params, OPTIMIZER.init(params)

    def train(self, batches: Sequence[Any], chunk: int) -> Any:
        state, losses = jax.tree.map(jnp.copy, self.state), []
        for i in range(0, len(batches), chunk):
            state, loss = self.one(state, batches[i]) if chunk == 1 else self.many(state, tuple(batches[i : i + chunk]))
            losses.append(loss)
        return jax.device_get((state, losses))

    def best(self, batches: Sequence[Any], chunk: int) -> int:
        """The faster of 1 and `chunk` steps per dispatch."""
        ways = [lambda size=size: self.train(batches[:chunk], size) for size in (1, chunk)]
        for compiling in ways:
            compiling()
        one_s, many_s = interleaved(*ways, rounds=3).wall_s.min(1)
        return 1 if one_s <= many_s else chunk


def run(quick: bool) -> list[dict[str, Any]]:
    if quick:
        return measured(0, 0, quick)
    fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with fresh as pool:
        of_models = [list(pool.map(measured, [k] * PROCESSES, range(PROCESSES))) for k in range(len(MODELS))]
    return [median(rows) for processes in of_models for rows in zip(*processes, strict=True)]


def median(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median row of several processes. Processes may choose different "auto" chunks; the row shows the first one."""
    return rows[0] | {
        name: float(np.median([row[name] for row in rows])) for name, how in COLUMNS.items() if how.endswith("f")
    }


def measured(k: int, turn: int, quick: bool = False) -> list[dict[str, Any]]:
    """Rows for batches on the device and on the host with the best handwritten chunk, and for the chunk that `train` chooses."""
    model = MODELS[k]
    chunk, steps = (4, 4) if quick else (model.chunk, model.steps)
    params, host = model.params(), model.batches(steps)
    hand, update = ByHand(loss_of(model.by_hand), params), fg.step(loss_of(model.layer), OPTIMIZER)
    state = update.init(params)
    device = jax.block_until_ready(jax.device_put(host))
    if turn % 2:
        for size in (1, chunk):
            fg.train(update, state, device[:chunk], steps=chunk, chunk=size, progress=False)
    best = chunk if quick else hand.best(device, chunk)

    def row(kind: str, batches: Sequence[Any], chunk: int | str, steps: int) -> dict[str, Any]:
        batches = list(itertools.islice(itertools.cycle(batches), steps))
        logs = []

        def ours():
            logs.append(fg.train(update, state, batches, steps=steps, chunk=chunk, progress=False)[1])

        ways = ours, lambda: hand.train(batches, best)
        for compiling in ways:
            compiling()
        times = interleaved(*ways, rounds=3 if quick else ROUNDS, within_s=WITHIN_S, least=1)
        funcgrad_s, hand_s = times.wall_s.min(1)
        return {
            "model": model.name,
            "batches": kind,
            "chunk": str(chunk) if chunk != "auto" else f"auto: {logs[0].chunk}",
            "steps": steps,
            "hand_per_s": steps / hand_s,
            "funcgrad_per_s": steps / funcgrad_s,
            "ratio": ratio(times.wall_s[1], times.wall_s[0]),
            "ratio_cpu": ratio(times.cpu_s[1], times.cpu_s[0]),
        }

    if quick:
        return [row("device", device, best, steps)]
    rows = [row("device", device, best, steps), row("host", host, best, steps)]
    return rows + ([row("device", device, "auto", model.auto_steps)] if model.auto_steps else [])


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    name = "{model}; {batches} batches, chunk {chunk}".format
    return [Figure(name(**row), row["ratio"], least=LEAST) for row in rows]
