"""Steps/s of `train` over a loop written by hand, in one process, the two taking turns.

    python benchmarks/training.py [rounds]

By hand: Adam from optax, the state donated, and the faster of one step at a time and `lax.scan` over 32 batches stacked
in the program. What `train` does besides (copying the state, measuring the chunk, looking for NaN) counts;
compilation does not. The ratio is the median over the rounds; on a busy machine, that of CPU seconds is the steadier.
"""

import itertools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from funcgrad.training import step, train

OPTIMIZER = optax.adam(1e-3)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp_loss(params, batch):
    x, labels = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return cross_entropy(x @ params[-1]["w"] + params[-1]["b"], labels)


def mlp():
    rng = np.random.default_rng(0)
    sizes = (784, 512, 512, 10)
    params = [
        {"w": (rng.normal(size=(i, o)) / i**0.5).astype("f"), "b": np.zeros(o, "f")}
        for i, o in itertools.pairwise(sizes)
    ]
    return mlp_loss, params, [(rng.normal(size=(128, 784)).astype("f"), rng.integers(0, 10, 128)) for _ in range(64)]


def lenet_loss(params, batch):
    x, labels = batch
    for name in ("c1", "c2"):
        x = lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["d1"])
    return cross_entropy(x @ params["d2"], labels)


def lenet():
    rng = np.random.default_rng(0)
    shapes = {"c1": (5, 5, 1, 16), "c2": (5, 5, 16, 32), "d1": (1568, 128), "d2": (128, 10)}
    params = {name: (rng.normal(size=s) / np.prod(s[:-1]) ** 0.5).astype("f") for name, s in shapes.items()}
    return (
        lenet_loss,
        params,
        [(rng.normal(size=(64, 28, 28, 1)).astype("f"), rng.integers(0, 10, 64)) for _ in range(64)],
    )


def by_hand(loss):
    def one(state, batch):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def many(state, batches):
        return lax.scan(one, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))

    return jax.jit(one, donate_argnums=0), jax.jit(many, donate_argnums=0)


def run_by_hand(program, size, params, batches):
    state, losses = jax.tree.map(jnp.copy, (params, OPTIMIZER.init(params))), []
    for i in range(0, len(batches), size):
        state, loss = program(state, batches[i] if size == 1 else tuple(batches[i : i + size]))
        losses.append(loss)
    return jax.device_get((state, losses))


def seconds(run):
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(label, ours, hand, steps, rounds):
    ours(), hand()  # compile
    took = [(seconds(ours), seconds(hand)) if i % 2 else (seconds(hand), seconds(ours))[::-1] for i in range(rounds)]
    wall, cpu = (statistics.median(theirs[i] / own[i] for own, theirs in took) for i in (0, 1))
    own, theirs = (steps / min(wall for wall, _ in side) for side in zip(*took, strict=True))
    print(f"  {label:<28} ratio {wall:.3f}, CPU {cpu:.3f}   at best {own:.1f} and {theirs:.1f} steps/s", flush=True)


def main(rounds=15):
    for name, model, short, long in (
        ("MLP 784-512-512-10, batch 128", mlp, 128, 1280),
        ("LeNet 28x28, batch 64", lenet, 32, 96),
    ):
        loss, params, host = model()
        device = jax.block_until_ready(jax.device_put(host))
        programs, update = by_hand(loss), step(loss, OPTIMIZER)
        state, chosen = update.init(params), []

        def hand(size, batches, steps, programs=programs, params=params):
            run_by_hand(programs[size > 1], size, params, list(itertools.islice(itertools.cycle(batches), steps)))

        def ours(chunk, batches, steps, update=update, state=state, chosen=chosen):
            _, log = train(update, state, itertools.cycle(batches), steps=steps, chunk=chunk, progress=False)
            chosen.append(log)

        speeds = {}
        for size in (1, 32):
            hand(size, device, 32)  # compile
            speeds[size] = min(seconds(lambda size=size: hand(size, device, 32))[1] for _ in range(3))
        best = min(speeds, key=speeds.get)
        print(f"\n{name}; by hand {best} per dispatch (32 take {speeds[32] / speeds[1]:.2f} x the time of 1)")
        for kind, batches in (("device", device), ("host", host)):
            label = f"chunk={best}, {kind} batches"
            compare(
                label, lambda b=batches: ours(best, b, short), lambda b=batches: hand(best, b, short), short, rounds
            )
        auto = lambda: ours("auto", device, long)
        compare(f'chunk="auto", {long} steps', auto, lambda: hand(best, device, long), long, max(rounds // 3, 1))
        print(f"  {chosen[-1]}".replace("\n", "\n  "))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
