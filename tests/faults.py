"""Thirty programs that return NaN or an infinity, and where that comes from.

Each is a function decorated with `@fault(*args)`. The line that is at fault has the comment `# fault`; what else is known of it
stands in the decorator. `FAULTS` holds them in the order of this page. `program` is what is run: the function, or its gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcgrad as fg


@dataclass(frozen=True, eq=False)
class Fault:
    """A program and what is to be found.

    Attributes:
      grad: what makes the program of the function; None for the function itself.
      within: the function that holds the line at fault.
      kind: what the fault makes. phase: where it does. of: the forward operation whose derivative it is in.
      iterations: of the loops around it. lanes: of the vmaps around it. index: of the element in the operation's result.
    """

    name: str
    f: Callable
    args: tuple
    grad: Callable | None
    within: Callable
    kind: str
    of: str | None
    iterations: tuple[tuple[str, int], ...]
    lanes: tuple[int, ...] | None
    index: tuple[int, ...]

    @property
    def program(self) -> Callable:
        return self.grad(self.f) if self.grad else self.f

    @property
    def phase(self) -> str:
        return "backward" if self.grad else "forward"

    @property
    def line(self) -> int:
        """The number of the line in this file that is at fault."""
        lines, first = inspect.getsourcelines(self.within)
        return first + next(k for k, line in enumerate(lines) if line.rstrip().endswith("# fault"))

    def __str__(self) -> str:
        return self.name


FAULTS: list[Fault] = []


def fault(*args, grad=None, within=None, kind="nan", of=None, iterations=(), lanes=None, index=()):
    arrays = tuple(map(jnp.asarray, args))

    def add(f):
        FAULTS.append(Fault(f.__name__, f, arrays, grad, within or f, kind, of, iterations, lanes, index))
        return f

    return add


def f32(*values):
    return np.array(values, np.float32)


# Single operations, forward


@fault(f32(1.0, 0.0, 3.0), kind="inf", index=(1,))
def log_of_zero(p):
    weights = p / p.sum()
    return -jnp.mean(
        jnp.log(weights)  # fault
    )


@fault(f32(0.1, 0.1, 0.1) + f32(1e4, 1e4, 1e4))
def root_of_a_negative_variance(x):
    variance = jnp.mean(x**2) - jnp.mean(x) ** 2 - 1e3
    deviation = jnp.sqrt(variance)  # fault
    return x / deviation


@fault(np.zeros((2, 3), np.float32), index=(0, 0))
def zero_over_zero(x):
    norms = jnp.sum(jnp.abs(x), axis=1, keepdims=True)
    return x / norms  # fault


@fault(f32(1.0, 2.0, 200.0), kind="inf", index=(2,))
def softmax_overflow(logits):
    weights = jnp.exp(logits)  # fault
    return weights / weights.sum()


@fault(np.full(100, 60.0, np.float16), kind="inf")
def float16_overflow(x):
    energy = x @ x  # fault
    return x * jnp.sqrt(energy)


@fault(jnp.full((4, 4), 3e19, jnp.bfloat16), kind="inf", index=(0, 0))
def bfloat16_overflow(x):
    y = x * x  # fault
    return y.sum(axis=0)


@fault(f32(10.0, 80.0, 100.0), kind="inf", index=(2,))
def infinity_alone(x):
    rate = jnp.exp(x)  # fault
    return rate + 1


@fault(f32(1.0, 0.0), index=(1,))
def zero_times_a_constant(x):
    ranges = jnp.array([2.0, jnp.inf])
    return x * ranges  # fault


@fault(np.arange(9, dtype=np.float32).reshape(3, 3), index=(0, 0))
def attention_row_that_is_masked(scores):
    mask = jnp.tril(jnp.ones((3, 3), bool), -1)
    scores = jnp.where(mask, scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(
        scores - largest  # fault
    )
    return weights / weights.sum(-1, keepdims=True)


@fault(f32(0.6, 0.9), index=())
def angle_of_no_cosine(x):
    cosine = x @ x
    return jnp.arccos(cosine)  # fault


@fault(f32(-2.0, 4.0), index=(0,))
def broken_power_of_a_negative_number(x):
    y = x + 1
    return jnp.sum(y**0.5 + jnp.power(y, 0.7))  # fault


@fault(np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 7]), index=(1, 0))
def index_out_of_bounds(table, rows):
    chosen = table.at[rows].get(mode="fill")  # fault
    return chosen.sum(axis=1)


# Linear algebra


@fault(np.array([[1.0, 2.0], [2.0, 1.0]], np.float32), index=(0, 0))
def cholesky_of_an_indefinite_matrix(a):
    factor = jnp.linalg.cholesky(a)  # fault
    return jnp.log(jnp.diag(factor)).sum()


@fault(np.ones((2, 2), np.float32), f32(1.0, 2.0), kind="inf", index=(0,))
def singular_solve(a, b):
    x = jnp.linalg.solve(a, b)  # fault
    return x * 2


# Loops and branches


@fault(np.float32(1.0), iterations=(("scan", 3),))
def scan_step(x):
    def step(level, t):
        level = level - 0.25
        return level, jnp.log(level - 0.1) + t  # fault

    return lax.scan(step, x, jnp.arange(6.0))[1]


@fault(np.float32(1.0), kind="inf", iterations=(("scan", 2), ("scan", 1)))
def scan_in_scan(x):
    def outer(x, i):
        def inner(x, j):
            gap = (i - 2) ** 2 + (j - 1) ** 2
            return x + 1 / gap, None  # fault

        return lax.scan(inner, x, jnp.arange(3.0))[0] * 0.5, None

    return lax.scan(outer, x, jnp.arange(4.0))[0]


@fault(np.float32(2.0), kind="inf", iterations=(("while", 6),))
def while_iteration(x):
    def body(state):
        k, x = state
        return k + 1, x * x  # fault

    return lax.while_loop(lambda state: state[0] < 12, body, (0, x))[1]


@fault(np.float32(0.0), kind="inf")
def branch(x):
    def steep(x):
        return 1 / x  # fault

    return lax.cond(x < 1, steep, lambda x: x, x) * 2


@fault(np.float32(3.0), iterations=(("scan", 4),))
def branch_in_a_loop(x):
    def body(k, x):
        def leap(x):
            return jnp.sqrt(x - 10)  # fault

        return lax.cond(k == 4, leap, lambda x: x + 0.5, x)

    return lax.fori_loop(0, 6, body, x)


# Lanes


@fault(np.array([[0.5], [1.0], [-1.0], [2.0]], np.float32), lanes=(2,), index=(0, 2))
def lane(xs):
    w = jnp.ones((3, 1))

    def one(x):
        h = w @ x
        return jnp.log(h).sum()  # fault

    return jax.vmap(one)(xs)


@fault(f32(1.0, 2.0, 0.5), iterations=(("scan", 3),), lanes=(2,), index=(2,))
def scan_in_lane(xs):
    def one(x):
        def step(x, _):
            x = x - 0.15
            return x, jnp.sqrt(x)  # fault

        return lax.scan(step, x, None, length=5)[1]

    return jax.vmap(one)(xs)


@fault(f32(1.0, 3.0), kind="inf", iterations=(("while", 6),), lanes=(1,), index=(1,))
def while_in_lane(xs):
    def one(x):
        def body(state):
            k, x = state
            return k + 1, x * x  # fault

        return lax.while_loop(lambda state: state[0] < 5 + jnp.int32(x), body, (0, x))[1]

    return jax.vmap(one)(xs)


# Gradients


def grad(f):
    return jax.grad(lambda *args: jnp.sum(f(*args)))


@fault(f32(4.0, 0.0, 1.0), grad=grad, kind="inf", of="sqrt", index=(1,))
def masked_root(x):
    root = jnp.sqrt(x)  # fault
    return jnp.where(x > 0, root, 0.0)


@fault(f32(4.0, 0.0), grad=grad, kind="inf", of="div", index=(1,))
def masked_quotient(x):
    share = jnp.ones_like(x) / x  # fault
    return jnp.where(x > 0, share, 0.0)


@fault(f32(0.0, 0.0), grad=grad, of="atan2")
def division_in_the_backward_only(x):
    angle = jnp.arctan2(x[0], x[1])  # fault
    return angle * 2


@fault(np.eye(2, dtype=np.float32), grad=grad, kind="inf", of="eigh", index=(0, 1))
def equal_eigenvalues(a):
    vectors = jnp.linalg.eigh(a)[1]  # fault
    return vectors[:, 0] * a[0]


@jax.custom_vjp
def scaled(x):
    return x * 2


def scaled_forward(x):
    return scaled(x), x


def scaled_backward(x, ct):
    share = ct / x  # fault
    return (share,)


scaled.defvjp(scaled_forward, scaled_backward)


@fault(f32(1.0, 0.0), grad=grad, within=scaled_backward, kind="inf", index=(1,))
def custom_backward(x):
    return scaled(x)


@fault(f32(3.0, 4.0, 0.0), grad=grad, kind="inf", of="sqrt", index=(2,))
def rematerialised(x):
    @jax.checkpoint
    def layer(x):
        y = jnp.sqrt(x)  # fault
        return jnp.sin(y)

    return layer(x) * x


@fault(np.float32(2.0), grad=grad, kind="inf", of="sqrt", iterations=(("scan", 4),))
def scan_step_backward(x):
    def step(x, t):
        root = jnp.sqrt(x * t)  # fault
        return x + jnp.where(t > 0, root, 0.0), None

    return lax.scan(step, x, jnp.array([4.0, 3.0, 2.0, 1.0, 0.0, 1.0]))[0]


@fault(np.float32(1.0), grad=fg.grad, kind="inf", of="sqrt", iterations=(("while", 3),))
def while_iteration_backward(x):
    def body(state):
        k, x = state
        return k + 1, jnp.sqrt(x) * (k - 2) ** 2 + jnp.float32(k > 2)  # fault

    return lax.while_loop(lambda state: state[0] < 5, body, (0.0, x))[1]
