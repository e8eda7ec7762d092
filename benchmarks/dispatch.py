"""What a call costs: `fg.jit` beside `jax.jit`, interleaved in one process.

    python benchmarks/dispatch.py [--json out.json] [--rounds 40]

A hit is a call that JAX dispatches from its cache. A nested call is one inside another trace, a callback one to a
function with effects: JAX dispatches neither from its cache, so the watch of `fg.jit` runs each time.
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp
from funcgrad.transforms.compilation import jit


def hit(jit, params):
    step = jit(lambda params: params["w0"] + 1)
    return lambda: step(params)


def nested(jit, params):
    step = jit(lambda params: params["w0"] + 1)
    return lambda: jax.eval_shape(lambda p: step(p), params)


def callback(jit, params):
    step = jit(lambda params: jax.debug.callback(lambda x: None, params["w0"]))
    return lambda: step(params)


def interleaved(calls, rounds, number):
    """CPU-µs per call, one list of rounds for each of `calls`, which take turns."""
    took = [[] for _ in calls]
    for call in calls:
        call()
    for turn in range(rounds):
        order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
        for k in order:
            call, start = calls[k], time.process_time()
            for _ in range(number):
                call()
            took[k].append((time.process_time() - start) / number * 1e6)
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    rows = []
    for name, make, number in (("hit", hit, 20_000), ("nested", nested, 50), ("callback", callback, 50)):
        for leaves in (2, 200):
            params = {f"w{i}": jnp.ones(()) for i in range(leaves)}
            calls = [make(jit, params), make(jax.jit, params)]
            ours, theirs = interleaved(calls, options.rounds, max(20, 2 * number // leaves))
            a, b = min(ours), min(theirs)
            rows.append(
                {"call": name, "leaves": leaves, "jax_us": b, "funcgrad_us": a, "difference_us": a - b, "ratio": a / b}
            )
    print(f"JAX {jax.__version__}, {jax.default_backend()}, {platform.machine()}: least of {options.rounds} rounds")
    print(f"{'call':<10}{'leaves':>7}{'jax.jit µs':>12}{'fg.jit µs':>12}{'difference µs':>15}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['call']:<10}{row['leaves']:>7}{row['jax_us']:>12.2f}{row['funcgrad_us']:>12.2f}"
            f"{row['difference_us']:>+15.2f}{row['ratio']:>8.3f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"jax": jax.__version__, "backend": jax.default_backend(), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
