"""Handwritten digits: a convolutional network, traced into a graph, trained, and tested on held-out images.

    pip install -e '.[examples]' && python examples/digits.py

Data: 1,797 images of 8×8 pixels that ship with scikit-learn (Alpaydin & Kaynak 1998, doi:10.24432/C50P49). The last line is
the accuracy on a held-out fifth; digits.png shows the training loss and the misclassified digits.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcgrad as fg
from funcgrad import nn

STEPS, BATCH = 1000, 64

model = nn.serial(
    *(nn.conv(32, (3, 3)), nn.batch_norm(), jax.nn.relu),
    *(nn.conv(32, (3, 3)), nn.batch_norm(), jax.nn.relu, nn.max_pool((2, 2))),
    *(nn.conv(64, (3, 3)), nn.batch_norm(), jax.nn.relu, nn.max_pool((2, 2))),
    *(nn.flatten, nn.dropout(0.3), nn.dense(10)),
)


def loss(params, batch, *, model_state, key):
    """Mean cross-entropy of a batch with label smoothing 0.1, and the running statistics of batch norm."""
    images, labels = batch
    logits, model_state = model.apply(params, model_state, images, key=key, train=True)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean(), model_state


def load(seed: int = 0):
    """Images float32[n, 8, 8, 1] in [0, 1] and labels int32[n], four fifths for training, one for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        hint = "pip install 'funcgrad[examples]'"
        raise fg.MissingExtra("this example reads scikit-learn's digits.", hint=hint) from None
    data = load_digits()
    images, labels = (data.images / 16).astype(np.float32)[..., None], data.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = np.split(order, [len(order) // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def batches(images, labels, seed: int = 0):
    """Endless shuffled batches; each image is shifted by up to one pixel."""
    rng = np.random.default_rng(seed)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    while True:
        for rows in rng.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH):
            down, right = rng.integers(0, 3, (2, BATCH, 1, 1))
            yield padded[rows[:, None, None], down + np.arange(8)[:, None], right + np.arange(8)], labels[rows]


def draw(path, log, images, labels, predictions):
    """Plot the loss over the steps, and the misclassified digits with their predicted labels."""
    try:
        import matplotlib
    except ImportError:
        raise fg.MissingExtra("this example draws with matplotlib.", hint="pip install 'funcgrad[examples]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    errors = np.flatnonzero(predictions != labels)
    figure = plt.figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axes = left.subplots()
    axes.semilogy(log.metrics["loss"], lw=0.6, alpha=0.4, color="tab:blue")
    window = np.ones(50) / 50
    axes.semilogy(np.arange(49, log.steps), np.convolve(log.metrics["loss"], window, "valid"), color="tab:blue")
    axes.set(xlabel="step", ylabel="cross-entropy, smoothed labels", title="training loss, and its mean over 50 steps")
    right.suptitle(f"misclassified: {len(errors)} of {len(labels)}")
    for cell, k in zip(right.subplots(2, 5, squeeze=False).flat, [*errors[:10], *[None] * 10], strict=False):
        cell.axis("off")
        if k is not None:
            cell.imshow(images[k, ..., 0], cmap="gray_r")
            cell.set_title(f"{labels[k]} as {predictions[k]}", fontsize=9)
    figure.savefig(path, dpi=120)


def main(path: str = "digits.png") -> float:
    (images, labels), (test_images, test_labels) = load()
    params, model_state = model.init(jax.random.key(0), images[:1])

    evaluate = fg.jit(lambda params, state, images: model.apply(params, state, images, train=False)[0])

    def classify(params, images):
        return model.apply(params, model_state, images, train=False)[0]

    print(fg.trace(classify, params, images[:1]))
    print(f"\n{sum(p.size for p in jax.tree.leaves(params)):,} parameters\n")

    update = fg.step(loss, optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-3))
    state = update.init(params, model_state=model_state, key=jax.random.key(1))
    with fg.prefetch(batches(images, labels)) as feed:
        state, log = fg.train(update, state, feed, steps=STEPS)
    print(log)

    predictions = np.asarray(jnp.argmax(evaluate(state.params, state.model_state, test_images), -1))
    draw(path, log, test_images, test_labels, predictions)
    accuracy = float(np.mean(predictions == test_labels))
    print(f"training loss and misclassified digits: {path}")
    print(f"accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:2])
