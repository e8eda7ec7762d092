"""Static and dynamic graphs: three networks, run eagerly, traced and compiled, and the cost of each.

    python examples/static_vs_dynamic.py [page.html]

A dense network has the same operations for every input. A recurrent network over sentences, written as a Python loop, has more
operations for longer sentences. A network over trees has a different program for every tree. In eager execution all three are
plain Python. With tracing, each structure and shape of the input needs its own compiled program.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

import funcgrad as fg

WIDTH = 32
KEYS = iter(jax.random.split(jax.random.key(0), 32))


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(next(KEYS), shape) / shape[0] ** 0.5


def mlp(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


def rnn(params, sentences):
    """Sentences are lists of words, of any lengths."""
    total = jnp.zeros(())
    for words in sentences:
        state = jnp.zeros(WIDTH)
        for word in words:
            state = jnp.tanh(params["state"] @ state + params["word"] @ word)
        total += jnp.sum(state)
    return total


def tree(params, node):
    """A leaf is a vector, an inner node a pair of nodes (Socher et al. 2011, Parsing natural scenes and language)."""
    return jnp.sum(encoded(params, node))


def encoded(params, node):
    if isinstance(node, tuple):
        left, right = (encoded(params, child) for child in node)
        return jnp.tanh(params["left"] @ left + params["right"] @ right)
    return node


def main(page: str = "static_vs_dynamic.html") -> fg.Comparison:
    layers = [normal(WIDTH, WIDTH) for _ in range(4)]
    cell = {"state": normal(WIDTH, WIDTH), "word": normal(WIDTH, WIDTH)}
    pair = {"left": normal(WIDTH, WIDTH), "right": normal(WIDTH, WIDTH)}
    words = [normal(WIDTH) for _ in range(8)]
    short, long = [words[:2], words[:5]], [words[:3], words, words[:4]]
    small, large = (
        ((words[0], words[1]), words[2]),
        (((words[0], words[1]), words[2]), (words[3], (words[4], words[5]))),
    )

    studies = fg.compare(
        fg.study(mlp, layers, normal(16, WIDTH), others=[(layers, normal(8, WIDTH))]),
        fg.study(rnn, cell, short, others=[(cell, long)]),
        fg.study(tree, pair, small, others=[(pair, large)]),
    )
    print(studies)
    for s in studies.studies:
        print(f"{s.name} with another input: {s.retraces[-1].strip()}")

    # Define-by-run: the gradient of the recorded operations. No program is compiled for the whole function.
    for f, params, x in ((rnn, cell, long), (tree, pair, large)):
        with fg.tape() as t:
            value = f(params, x)
        differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), t.grad(value, params), fg.grad(f)(params, x))
        gap = max(map(float, jax.tree.leaves(differences)))
        print(
            f"{f.__name__}: {len(t)} recorded operations; the gradients of tape and fg.grad differ by at most {gap:.0e}"
        )
    print(f"the reports are in {studies.save(page)}")
    return studies


if __name__ == "__main__":
    main(*sys.argv[1:])
