"""Hares and lynxes: the parameters of an ODE, fitted through an integrator with adaptive step size.

    pip install -e '.[examples]' && python examples/adaptive_ode.py

The integrator is a `while` loop, and its number of steps depends on the parameters. `jax.grad` cannot differentiate it in reverse
mode; `fg.grad` can, without a change of the code.

Data: thousands of pelts per year, 1900 to 1920, collected by the Hudson's Bay Company (Howard 2009, Modeling basics).
Model: Lotka (1925) and Volterra (1926). Method: Bogacki & Shampine 1989, doi:10.1016/0893-9659(89)90079-7.
"""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import funcgrad as fg

STEPS = 600
YEARS = np.arange(1900, 1921)
# fmt: off
HARES = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1,
         40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
LYNXES = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4,
          8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
# fmt: on
PELTS = jnp.array([HARES, LYNXES]).T

START = {"rates": jnp.log(jnp.array([0.6, 0.03, 0.6, 0.02])), "first": jnp.log(PELTS[0])}


def growth(params, log_pelts):
    """The relative growth rates of hares and lynxes, per year."""
    birth, predation, death, conversion = jnp.exp(params["rates"])
    hares, lynxes = jnp.exp(log_pelts)
    return jnp.stack([birth - predation * lynxes, conversion * hares - death])


def after_a_year(params, x, tolerance=1e-4):
    """`x` one year later, and the number of steps: a 3rd-order method with an embedded 2nd-order error estimate."""
    f = lambda x: growth(params, x)

    def step(carry):
        t, x, h, count = carry
        k1 = f(x)
        k2 = f(x + h / 2 * k1)
        k3 = f(x + 3 * h / 4 * k2)
        new_x = x + h * (2 * k1 + 3 * k2 + 4 * k3) / 9
        error = jnp.max(jnp.abs(h * (-5 * k1 / 72 + k2 / 12 + k3 / 9 - f(new_x) / 8))) / tolerance
        is_accepted = error < 1
        t, x = jnp.where(is_accepted, t + h, t), jnp.where(is_accepted, new_x, x)
        new_h = h * jnp.clip(0.9 * jnp.maximum(error, 1e-6) ** (-1 / 3), 0.2, 5.0)
        return t, x, jnp.minimum(lax.stop_gradient(new_h), 1 - t), count + 1

    _, x, _, count = lax.while_loop(lambda carry: carry[0] < 1 - 1e-6, step, (0.0, x, 0.1, 0))
    return x, count


def trajectory(params):
    """Log pelts float32[21, 2] at the start of each year, and the number of steps int32[20] in each year."""

    def year(x, _):
        x, count = after_a_year(params, x)
        return x, (x, count)

    _, (later, counts) = lax.scan(year, params["first"], None, length=len(YEARS) - 1)
    return jnp.concatenate([params["first"][None], later]), counts


def loss(params):
    """Mean squared error of the log pelts."""
    log_pelts, counts = trajectory(params)
    return jnp.mean((log_pelts - jnp.log(PELTS)) ** 2), counts


def fit(params):
    """The fitted parameters, and the loss at each step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))

    @fg.jit
    def update(params, state):
        (value, counts), grads = fg.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value, counts

    state, values = optimizer.init(params), []
    for k in range(STEPS):
        params, state, value, counts = update(params, state)
        values.append(float(value))
        if k % max(1, STEPS // 5) == 0:
            steps = f"{int(counts.min())} to {int(counts.max())}"
            print(f"step {k:4d}  loss {value:.4f}  {steps} integrator steps a year")
    return params, values


def draw(path, params):
    """Plot the data and the fit of both species."""
    try:
        import matplotlib
    except ImportError:
        raise fg.MissingExtra("this example draws with matplotlib.", hint="pip install 'funcgrad[examples]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fitted = np.exp(trajectory(params)[0])
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for k, (name, color) in enumerate((("hares", "tab:blue"), ("lynxes", "tab:red"))):
        axes.plot(YEARS, PELTS[:, k], "o", color=color, label=f"{name}, data")
        axes.plot(YEARS, fitted[:, k], "-", color=color, label=f"{name}, fit")
    axes.set(xlabel="year", ylabel="pelts, thousands", title="Lotka-Volterra, fitted through an adaptive integrator")
    axes.set(xticks=YEARS[::4], ylim=(0, 105))
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120)


def main(path: str = "adaptive_ode.png") -> float:
    params, values = fit(START)
    names = "births of hares", "predation per lynx", "deaths of lynxes", "conversion per hare"
    for name, rate in zip(names, jnp.exp(params["rates"]), strict=True):
        print(f"{name:20} {rate:.4f} a year")
    draw(path, params)
    print(f"data and fit: {path}")
    print(f"loss {values[-1]:.4f}")
    return values[-1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
