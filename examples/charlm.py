"""A small causal transformer, a language model of characters.

    pip install -e . && python examples/charlm.py [text-file]

Without a file it reads the 700 KB of help texts that ship with CPython (`pydoc_data.topics`). It prints a sample, and nats per
character of training and of held-out text.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import funcgrad as fg
from funcgrad import nn

CONTEXT, BATCH, FEATURES, LAYERS, HEADS, STEPS = 64, 24, 96, 3, 4, 700


def transformer(vocabulary: int, context: int = CONTEXT) -> nn.Layer:
    """Logits float32[batch, time, vocabulary] of the next character, from int32[batch, time]."""
    block = nn.serial(
        nn.residual(nn.layer_norm(), nn.attention(HEADS, causal=True)),
        nn.residual(nn.layer_norm(), nn.dense(4 * FEATURES), jax.nn.gelu, nn.dense(FEATURES)),
    ).named("block")
    position = nn.stateless(
        lambda key, x: {"w": 0.02 * jax.random.normal(key, (context, FEATURES))},
        lambda params, x: x + params["w"][: x.shape[-2]],
        "position",
    )
    return nn.serial(
        nn.embedding(vocabulary, FEATURES, w=jax.nn.initializers.normal(0.02)),
        position,
        *[block] * LAYERS,
        nn.layer_norm(),
        nn.dense(vocabulary),
    )


def load(path: str | None) -> tuple[np.ndarray, str]:
    """The text as indices int32[n] into its alphabet, and the alphabet as a string."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = Path(path).read_text()
    alphabet = "".join(sorted(set(text)))
    index = {c: k for k, c in enumerate(alphabet)}
    return np.array([index[c] for c in text], np.int32), alphabet


def batches(text: np.ndarray, seed: int = 0):
    """Endless batches of windows int32[BATCH, CONTEXT + 1] at random positions."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - CONTEXT - 1, BATCH)
        yield text[starts[:, None] + np.arange(CONTEXT + 1)]


def sample(model: nn.Layer, params, key, length: int, *, temperature: float = 0.7) -> jax.Array:
    """Sample int32[length] characters, each from the CONTEXT characters before it."""

    def next_character(window, key):
        logits = model(params, window[None])[0, -1] / temperature
        character = jax.random.categorical(key, logits)
        return jnp.append(window[1:], character.astype(window.dtype)), character

    start = jnp.zeros(CONTEXT, jnp.int32)
    return lax.scan(next_character, start, jax.random.split(key, length))[1]


def main(path: str | None = None) -> float:
    text, alphabet = load(path)
    train, held_out = np.split(text, [len(text) * 95 // 100])
    model = transformer(len(alphabet))

    def loss(params, windows):
        logits = model(params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    params, _ = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))
    size = sum(p.size for p in jax.tree.leaves(params))
    print(f"{len(text):,} characters, {len(alphabet)} different ones; {size:,} parameters")

    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, STEPS // 10, STEPS, 1e-4)
    update = fg.step(loss, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)))
    with fg.prefetch(batches(train)) as feed:
        state, log = fg.train(update, update.init(params), feed, steps=STEPS)
    print(log)

    characters = fg.jit(sample, static_argnums=(0, 3))(model, state.params, jax.random.key(2), 400)
    print(f"\n{''.join(alphabet[k] for k in characters)}\n")
    training_loss = float(np.mean(log.metrics["loss"][-50:]))
    held_out_loss = float(fg.jit(loss)(state.params, next(batches(held_out, seed=1))))
    print(f"nats per character: {training_loss:.3f} in training, {held_out_loss:.3f} on held-out text")
    return training_loss


if __name__ == "__main__":
    main(*sys.argv[1:2])
