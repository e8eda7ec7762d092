"""One list of small programs that every transform must handle.

Each is an ordinary function with concrete inputs, decorated with `@program(*args)`; `CORPUS` holds them in the order of
this page. `diff` names the arguments to differentiate, None where there is nothing to differentiate, and `lacks` the
transforms that JAX itself refuses for the program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

REVERSE = frozenset({"grad", "value_and_grad", "vjp", "jacrev", "hessian", "grad_of_vmap", "vmap_of_grad"})
FORWARD = frozenset({"jvp", "linearize", "jacfwd", "hessian"})
BATCHED = frozenset({"vmap", "grad_of_vmap", "vmap_of_grad", "jacfwd", "jacrev", "hessian"})
GRADIENT = REVERSE | FORWARD
SECOND = frozenset({"hessian"})


@dataclass(frozen=True, eq=False)
class Program:
    """A function, the arguments to call it with, and what JAX can do with it."""

    name: str
    f: Callable
    args: tuple
    diff: int | tuple[int, ...] | None = 0
    lacks: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


CORPUS: list[Program] = []


def program(*args: Any, diff: int | tuple[int, ...] | None = 0, lacks: frozenset[str] = frozenset()) -> Callable:
    def add(f: Callable) -> Callable:
        CORPUS.append(Program(f.__name__, f, args, diff, lacks))
        return f

    return add


random = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(0.5 * random.standard_normal(shape), dtype)


def between(low: float, high: float, *shape: int) -> jax.Array:
    return jnp.asarray(random.uniform(low, high, shape), np.float32)


def whole(high: int, *shape: int) -> jax.Array:
    return jnp.asarray(random.integers(0, high, shape), np.int32)


KEY = jax.random.key(0)
MESH = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])


# Scalars, shapes and trees


@program(jnp.float32(0.7))
def scalar(x):
    return jnp.sin(x) * x


@program(0.7, 3)
def python_scalars(x, n):
    return x**2 * n


@program(2.0, normal(3))
def weak_types(x, y):
    return x + 1, y * 2, lax.select(y > 0, x * y, jnp.zeros_like(y))


@program(jnp.zeros((0, 3)), normal(3))
def zero_size(x, y):
    return x @ y, jnp.sum(x), jnp.concatenate([x, y[None]])


@program({"w": normal(3), "b": None, "t": (normal(3), [normal(3)])})
def none_in_trees(p):
    return {"y": p["w"] * p["t"][0], "none": p["b"], "z": (p["t"][1][0], ())}


class Point(NamedTuple):
    x: jax.Array
    y: jax.Array


@program(Point(normal(3), normal(3)))
def namedtuples(p):
    return Point(p.x * p.y, jnp.cos(p.y))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["act"])
@dataclass
class Layer:
    w: jax.Array
    b: jax.Array
    act: str


@program(Layer(normal(3, 3), normal(3), "tanh"), normal(3))
def dataclasses(layer, x):
    return Layer(getattr(jnp, layer.act)(x @ layer.w + layer.b), layer.b, "none")


@jax.tree_util.register_pytree_with_keys_class
class Box:
    """A custom node that carries static data."""

    def __init__(self, inside, label):
        self.inside, self.label = inside, label

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("inside"), self.inside),), self.label

    @classmethod
    def tree_unflatten(cls, label, children):
        return cls(children[0], label)


@program(Box(normal(4), "in"))
def custom_nodes(box):
    return Box(jnp.exp(box.inside), box.label + "/out")


@program(normal(3), normal(3))
def unused_and_forwarded(x, y):
    return x, x, jnp.ones(2)


@program(normal(3), normal(3), diff=(1, 0))
def argnums(x, y):
    return x * jnp.sin(y)


BIG = np.linspace(-1, 1, 30_000, dtype=np.float32)


@program(normal(3))
def closed_over_constants(x):
    return jnp.sum(BIG.reshape(3, -1) * x[:, None], 1) + jnp.asarray(BIG[:3])


# Elementwise, reductions, contractions


@program(between(0.1, 0.9, 6))
def elementwise(x):
    return [f(x) for f in (jnp.tanh, jnp.log1p, jnp.expm1, lax.rsqrt, lax.erf, lax.lgamma, jnp.arcsin, jnp.cbrt)], x**3


@program(normal(3, 4))
def reductions(x):
    return x.sum(0), x.max(1), x.min(), x.prod(1), x.mean(), x.var(0), jnp.argmax(x, 1), (x > 0).any(0)


@program(normal(3, 4))
def softmax_family(x):
    return jax.nn.logsumexp(x, axis=1), jax.nn.softmax(x), jax.nn.log_softmax(x, axis=0), jnp.linalg.norm(x)


@program(jnp.array([0.0, 1.0, -2.0, 4.0]))
def safe_where(x):
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0), jnp.nan_to_num(x / jnp.abs(x).sum())


@program(normal(2, 3, 4), normal(2, 4, 5))
def einsum(x, y):
    return jnp.einsum("bij,bjk->bik", x, y), jnp.einsum("bij->ji", x), jnp.tensordot(x, y, ((2,), (1,)))


@program(normal(4), normal(4))
def stop_gradient(x, y):
    return lax.stop_gradient(x) * y + x


@program(normal(4), normal(4))
def optimization_barrier(x, y):
    x, y = lax.optimization_barrier((x * 2, y))
    return x * y


@program(between(0, 3, 5), jnp.arange(4.0), normal(4))
def interp(x, xs, ys):
    return jnp.interp(x, xs, ys), jnp.searchsorted(xs, x), jnp.polyval(ys, x)


@program(normal(5), normal(3))
def vectorize(x, y):
    return jnp.vectorize(lambda a, b: a * jnp.sum(b), signature="(),(n)->()")(x, y)


# Integers, keys, mixed precision, complex


@program(whole(9, 4), normal(4), diff=1)
def integer_inputs(n, x):
    return x * n.astype(x.dtype), n // 2, n > 3, lax.population_count(n)


@program(normal(3, 4), normal(4, 2, dtype=jnp.bfloat16), lacks=frozenset({"jacrev"}))
def mixed_bfloat16(x, w):
    y = x.astype(jnp.bfloat16) @ w
    return y, y.astype(jnp.float32).sum(), lax.dot(x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32)


@program(normal(4, dtype=jnp.float16), lacks=frozenset({"jacrev"}))
def mixed_float16(x):
    return jnp.tanh(x) * 2, x.astype(jnp.float32) ** 2


@program(normal(4))
def bitcast(x):
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(bits ^ 1, jnp.float32) + x


@program(lax.complex(normal(4), normal(4)), lacks=frozenset({"jacfwd", "hessian"}))
def complex_numbers(z):
    w = jnp.exp(1j * z) * z
    return jnp.abs(w), jnp.conj(w) * z, w.real + jnp.angle(z)


@program(normal(8))
def fft(x):
    return (
        jnp.abs(jnp.fft.rfft(x)),
        jnp.fft.ifft(jnp.fft.fft(x.astype(jnp.complex64))).real,
        jnp.fft.irfft(jnp.fft.rfft(x)),
    )


@program(KEY, normal(4), diff=1)
def random_numbers(key, x):
    a, b = jax.random.split(key)
    return x + jax.random.normal(a, (4,)), jax.random.permutation(b, 5), jax.random.fold_in(key, 3)


@program(KEY, normal(3, 4), diff=1)
def dropout(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0.0)


@program(jax.random.split(KEY, 3), normal(3), diff=1)
def key_arrays(keys, x):
    return keys[::-1], jax.vmap(lambda k, x: x * jax.random.uniform(k))(keys, x), jax.random.key_data(keys)


@program(jax.random.PRNGKey(1), normal(3), diff=1)
def raw_keys(key, logits):
    return logits * 2, jax.random.categorical(key, logits), jax.random.gumbel(key, (2,))


@program(between(0.5, 3, 3))
def random_gamma(alpha):
    return jax.random.gamma(jax.random.key(1), alpha)


# Indexing, sorting, cumulative operations


@program(normal(5, 3), whole(5, 4))
def gather(x, i):
    return (
        x[i],
        x[i, i % 3],
        jnp.take(x, i, axis=0, mode="clip"),
        x[::-2, 1:],
        jnp.take_along_axis(x, i[None, :3] % 5, 0),
    )


@program(normal(5), normal(4), whole(5, 4), diff=(0, 1))
def scatter(x, y, i):
    return x.at[i].add(y), x.at[1].set(y[0]), x.at[i].max(y), x.at[:4].multiply(y), x.at[7].add(1.0, mode="drop")


@program(normal(6, 4), jnp.int32(2))
def dynamic_slices(x, i):
    y = lax.dynamic_slice(x, (i, 1), (3, 2))
    return y, lax.dynamic_update_slice(x, y * 2, (i - 1, 0)), lax.dynamic_index_in_dim(x, i, 0)


@program(normal(8), jnp.array([0, 0, 1, 2, 2, 2, 3, 3]))
def segments(x, ids):
    return jax.ops.segment_sum(x, ids, 4), jax.ops.segment_max(x, ids, num_segments=4)


@program(normal(7), normal(7))
def sorting(x, y):
    keys, values = lax.sort((x, y), num_keys=1)
    return jnp.sort(x), jnp.argsort(x), lax.top_k(x, 3), keys * values, jnp.median(x)


@program(between(0.5, 1.5, 6))
def cumulative(x):
    return jnp.cumsum(x), lax.cummax(x), jnp.cumprod(x), lax.cumlogsumexp(x), lax.cummin(x, reverse=True)


@program(normal(3, 4), whole(4, 3))
def one_hot(x, labels):
    return -jnp.sum(jax.nn.one_hot(labels, 4) * jax.nn.log_softmax(x)), jnp.pad(x, 1), jnp.roll(x, 1, 0), jnp.tril(x)


# Layers


@program(normal(5, 3), normal(3, 4), normal(4), diff=(1, 2))
def dense(x, w, b):
    return jax.nn.relu(x @ w + b), jax.nn.gelu(x @ w)


@program(normal(3, 3, 2, 4), normal(4), normal(4), normal(2, 6, 6, 2), diff=(0, 1, 2))
def conv_batch_norm(w, scale, shift, x):
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = (y - y.mean((0, 1, 2))) * lax.rsqrt(y.var((0, 1, 2)) + 1e-5) * scale + shift
    return lax.reduce_window(jax.nn.relu(y), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


@program(normal(1, 1, 6), normal(1, 1, 3))
def conv_1d(x, w):
    return lax.conv_general_dilated(x, w, (2,), [(1, 1)], rhs_dilation=(2,)), jnp.convolve(x[0, 0], w[0, 0])


@program(normal(1, 4, 4, 4), normal(2, 2, 2, 2), diff=(0, 1))
def conv_grouped_transposed(x, w):
    y = lax.conv_general_dilated(
        x, w, (1, 1), "VALID", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y, lax.conv_transpose(y, w, (2, 2), "SAME")


@program(normal(1, 1, 4, 4, 4), normal(1, 1, 2, 2, 2), diff=(0, 1))
def conv_3d(x, w):
    return lax.conv_general_dilated(x, w, (1, 1, 1), "VALID")


@program({c: normal(8, 8) for c in "qkvo"}, normal(2, 4, 8))
def attention(p, x):
    q, k, v = (jnp.reshape(x @ p[c], (2, 4, 2, 4)) for c in "qkv")
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(4)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((4, 4), bool)), scores, -1e9))
    return x + jnp.einsum("bhlm,bmhd->blhd", weights, v).reshape(x.shape) @ p["o"]


@program({"x": normal(3, 16), "h": normal(4, 16), "b": normal(16)}, normal(5, 2, 3))
def lstm(p, xs):
    def cell(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return lax.scan(cell, (jnp.zeros((2, 4)), jnp.zeros((2, 4))), xs)


@program(normal(6, 3), whole(6, 4))
def embedding(table, tokens):
    h = table[tokens]
    return (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5) @ table.T


# Loops and branches


@program(normal(3), normal(4, 3), diff=(0, 1))
def scan(c, xs):
    return lax.scan(lambda c, x: (jnp.sin(c) * x, c + x), c, xs)


@program(normal(3), normal(5, 3))
def scan_options(c, xs):
    c, ys = lax.scan(lambda c, x: (c * 0.9 + x, c.sum()), c, xs, reverse=True, unroll=2)
    d, none = lax.scan(lambda c, _: (jnp.tanh(c), None), c, None, length=3)
    return c, ys, d, none


@program(normal(3), normal(2, 4, 3))
def scan_nested(c, xs):
    def outer(c, xs):
        c, ys = lax.scan(lambda c, x: (c * jnp.cos(x), c.sum()), c, xs)
        return c, ys.max()

    return lax.scan(outer, c, xs)


@program({"n": jnp.int32(0), "x": normal(3)}, normal(4, 3), lacks=frozenset({"jacfwd", "hessian"}))
def scan_tree_carry(c, xs):
    return lax.scan(lambda c, x: ({"n": c["n"] + 1, "x": c["x"] * x}, (c["n"], None)), c, xs)


@program(normal(3), normal(3, 3))
def fori_loop(x, w):
    return lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w + 0.1 * i), x)


@program(normal(3), jnp.float32(2.0), lacks=REVERSE)
def while_loop(x, limit):
    return lax.while_loop(
        lambda s: (s[0] < 5) & (jnp.sum(s[1]) < limit), lambda s: (s[0] + 1, s[1] + jnp.exp(s[1])), (0, x)
    )


@program(normal(4), whole(5, 4), lacks=REVERSE)
def while_in_scan(x, n):
    return lax.scan(lambda c, k: (lax.fori_loop(0, k, lambda i, y: jnp.sin(y), c), k), x, n)


@program(normal(4), jnp.bool_(True))
def cond(x, p):
    return lax.cond(p, lambda x: (jnp.sin(x), x.sum()), lambda x: (x * 2, 1.0), x), lax.cond(p, lambda: x, lambda: -x)


@program(normal(4), jnp.int32(1))
def switch(x, i):
    return lax.switch(i, [jnp.sin, lambda x: x * jnp.exp(x), lambda x: jnp.zeros(4)], x)


@program(normal(3), normal(5, 3))
def branches_in_loops(c, xs):
    def body(c, x):
        c = lax.cond(
            c.sum() > x.sum(), lambda c: jnp.sin(c * x), lambda c: lax.fori_loop(0, 2, lambda _, c: c + x, c), c
        )
        return c, lax.switch((x.sum() > 0).astype(jnp.int32), [jnp.sum, jnp.max], c)

    return lax.scan(body, c, xs)


@program(normal(3), jnp.bool_(False))
def loops_in_branches(x, p):
    loop = lambda x: lax.scan(lambda c, _: (jnp.cos(c), c.sum()), x, None, length=3)
    return lax.cond(p, loop, lambda x: (x, jnp.zeros(3)), x)


@program(normal(6, 2), normal(6, 2))
def associative_scan(a, b):
    return lax.associative_scan(lambda l, r: (l[0] * r[0], l[1] * r[0] + r[1]), (a, b))


@program(normal(5, 3))
def mapped(xs):
    return lax.map(lambda x: jnp.sin(x).sum(), xs), lax.map(jnp.cos, xs, batch_size=2)


@program(normal(6))
def custom_reduce(x):
    y = lax.stop_gradient(x)
    return x * lax.reduce(y, jnp.float32(1), lambda a, b: a * b + a, (0,)), lax.reduce_precision(x, 8, 10)


# The user's own derivatives and batching


@jax.custom_jvp
def soft(x, y):
    return jnp.logaddexp(x, y)


@soft.defjvp
def _(primals, tangents):
    return soft(*primals), 0.5 * tangents[0] + 2.0 * tangents[1]


@program(normal(4))
def custom_jvp(x):
    return soft(x, 2 * x) + jax.nn.silu(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def power(g, n, x):
    return g(x) ** n


@power.defjvp
def _(g, n, primals, tangents):
    return power(g, n, *primals), n * tangents[0]


@program(normal(4))
def custom_jvp_nondiff(x):
    return power(jnp.sin, 3, x)


@jax.custom_jvp
def product(x, y):
    return x * y


@functools.partial(product.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    zero = jax.custom_derivatives.SymbolicZero
    parts = [a * b for a, b in ((dx, y), (dy, x)) if not isinstance(a, zero)]
    return x * y, 3 * sum(parts[1:], parts[0]) if parts else jnp.zeros_like(x)


@program(normal(4), normal(4))
def custom_jvp_symbolic_zeros(x, y):
    return product(x, y) + product(jnp.sin(x), x)


@jax.custom_jvp
def each(x, y):
    return x * jnp.sin(y)


each.defjvps(lambda dx, out, x, y: dx * jnp.sin(y), None)


@program(normal(4), normal(4), diff=(0, 1))
def custom_jvp_in_loops(x, y):
    return lax.scan(lambda c, _: (each(c, y), jax.jit(each)(c, c)), x, None, length=3)


@jax.custom_vjp
def clipped(x):
    return 2 * x


clipped.defvjp(lambda x: (2 * x, x), lambda x, ct: (jnp.clip(ct, -0.1, 0.1) * x,))


@program(normal(4), lacks=FORWARD - SECOND)
def custom_vjp(x):
    return clipped(jnp.sin(x)) ** 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scaled(x, by):
    return {"y": x["a"] * by, "n": x["n"]}


def scaled_fwd(x, by):
    return scaled(x, by), (x["a"],)


def scaled_bwd(by, residuals, ct):
    return ({"a": ct["y"] * by * residuals[0], "n": None},)


scaled.defvjp(scaled_fwd, scaled_bwd)


@program(normal(4), lacks=FORWARD)
def custom_vjp_nondiff(x):
    return scaled({"a": x, "n": jnp.arange(4)}, 3.0)


@program(normal(4), lacks=FORWARD - SECOND)
def custom_vjp_in_loops(x):
    body = lambda c, _: (clipped(c) + jax.jit(clipped)(jnp.sin(c)), lax.cond(c.sum() > 0, clipped, jnp.cos, c))
    return lax.scan(body, x, None, length=3)


@jax.custom_vjp
def halved(x, y):
    return x * y / 2


def halved_fwd(x, y):
    return x.value * y.value / 2, (x.value, y.value, y.perturbed)


def halved_bwd(residuals, ct):
    x, y, perturbed = residuals
    return (jnp.zeros_like(x) if isinstance(ct, jax.custom_derivatives.SymbolicZero) else ct * y), (
        ct * x if perturbed else None
    )


halved.defvjp(halved_fwd, halved_bwd, symbolic_zeros=True)


@program(normal(4), normal(4), lacks=FORWARD - SECOND)
def custom_vjp_symbolic_zeros(x, y):
    return halved(x, y), halved(y, y)


@jax.custom_vjp
def settle(x):
    return lax.while_loop(lambda s: jnp.sum(s**2) > 0.1, lambda s: s / 2, x)


settle.defvjp(lambda x: (settle(x), x), lambda x, ct: (ct * 0.5 * x,))


@program(normal(4), lacks=FORWARD)
def custom_vjp_over_while(x):
    return settle(x) * x


@program(normal(4), lacks=FORWARD - SECOND)
def custom_gradient(x):
    @jax.custom_gradient
    def log1pexp(x):
        e = jnp.exp(x)
        return jnp.log1p(e), lambda ct: ct * (1 - 1 / (1 + e))

    return log1pexp(x)


@jax.custom_batching.custom_vmap
def doubled(x, y):
    return x * 2 + y


@doubled.def_vmap
def _(axis_size, in_batched, x, y):
    return x * 2 + y + 10, any(in_batched)


@program(normal(4), normal(4), lacks=REVERSE - {"grad_of_vmap"} | {"linearize"})
def custom_vmap(x, y):
    return doubled(jnp.sin(x), y)


@program(normal(3, 3), normal(3))
def custom_linear_solve(a, b):
    a = a @ a.T + 3 * jnp.eye(3)
    return lax.custom_linear_solve(lambda x: a @ x, b, lambda _, b: jnp.linalg.solve(a, b), symmetric=True)


@program(jnp.float32(3.0))
def custom_root(x):
    newton = lambda f, y: lax.fori_loop(0, 8, lambda _, y: y - f(y) / jax.grad(f)(y), y)
    return lax.custom_root(lambda y: y**2 - x, jnp.float32(1.0), newton, lambda g, y: y / g(jnp.float32(1.0)))


@program(normal(3), normal(3, 3))
def linear_transpose(x, w):
    return jax.linear_transpose(lambda x: w @ x, x)(x)[0] * x


@program(normal(3))
def derivatives_inside(x):
    f = lambda x: jnp.sum(jnp.sin(x) ** 3)
    return jax.grad(f)(x), jax.jvp(f, (x,), (x,))[1], jax.hessian(f)(x) @ x


# Checkpointing


@program(normal(3, 3), normal(2, 3), diff=(0, 1))
def checkpoint(w, x):
    block = lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w.T)
    x = jax.checkpoint(block)(w, x)
    x = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)(w, x)
    return jax.checkpoint(lambda x: jax.checkpoint(block)(w, jnp.sin(x)), prevent_cse=False)(x)


@program(normal(3, 3), normal(4, 3))
def checkpoint_in_scan(w, xs):
    @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names("h"))
    def body(c, x):
        h = checkpoint_name(jnp.sin(c @ w), "h")
        return jnp.cos(h) * x, h.sum()

    return lax.scan(body, jnp.ones(3), xs)


@program(normal(3), 2)
def checkpoint_static(x, n):
    return jax.checkpoint(lambda x, n: jnp.sin(x) * n, static_argnums=(1,))(x, 3) * n


# Linear algebra


@program(normal(3, 3), normal(3))
def solves(a, b):
    s = a @ a.T + 3 * jnp.eye(3)
    factor = jnp.linalg.cholesky(s)
    return (
        jnp.linalg.solve(s, b),
        jax.scipy.linalg.solve_triangular(factor, b, lower=True),
        jnp.linalg.inv(a + 3 * jnp.eye(3)),
    )


@program(jnp.asarray(np.diag([1.0, 2.0, 4.0]) + 0.1, np.float32))
def factorisations(a):
    q, r = jnp.linalg.qr(a)
    w, v = jnp.linalg.eigh(a)
    return q, r, w, jnp.abs(v), jnp.linalg.svd(a, compute_uv=False), jnp.linalg.slogdet(a), jnp.linalg.det(a)


@program(normal(2, 3, 3))
def linalg_batch(a):
    s = a @ jnp.swapaxes(a, 1, 2) + 3 * jnp.eye(3)
    return jnp.linalg.cholesky(s), jnp.linalg.slogdet(s)[1], jnp.trace(s, axis1=1, axis2=2)


# Effects, references, callbacks


@program(normal(4), lacks=GRADIENT)
def pure_callback(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims") * x


@program(normal(4), lacks=GRADIENT)
def io_callbacks(x):
    return io_callback(lambda x: np.asarray(2 * x), jax.ShapeDtypeStruct(x.shape, x.dtype), x) + x


@program(normal(4))
def debug_callback(x):
    jax.debug.callback(lambda x: None, x)
    return jnp.sin(x)


@program(normal(3), lacks=frozenset({"jacfwd", "hessian"}))
def references(x):
    total = jax.new_ref(jnp.zeros(3))
    total[...] = x * 2
    total[0] += jnp.sin(x[1])
    return total[...] * x, jax.freeze(total)


@program(normal(3), normal(4, 3), lacks=frozenset({"jacfwd", "hessian"}))
def references_in_loops(x, xs):
    total = jax.new_ref(x)

    def body(c, x):
        total[...] = total[...] * jnp.cos(x)
        return c + 1, None

    count, _ = lax.scan(body, 0, xs)
    return total[...], count


# Jit, scopes, devices


@functools.partial(jax.jit, static_argnames=("n", "act"))
def layer(x, w, n, act=jnp.tanh):
    for _ in range(n):
        x = act(x @ w)
    return x


@program(normal(2, 3), normal(3, 3), diff=(0, 1))
def jit_shared(x, w):
    for _ in range(4):
        x = layer(x, w, 1)
    return layer(x, w, n=2, act=jnp.sin)


@program(normal(3), normal(3))
def jit_options(x, y):
    donating = jax.jit(lambda x, y: (x * 2, y), donate_argnums=0, keep_unused=True)
    inlined = jax.jit(lambda x: jnp.sin(x), inline=True)
    return inlined(donating(x + 1, y)[0]), jax.jit(lambda x: x)(y), jax.jit(lambda: jnp.arange(3.0))()


@program(normal(3))
def scopes(x):
    with jax.named_scope("outer"), jax.named_scope("inner"):
        y = jnp.sin(x)
    return jax.named_call(lambda y: jnp.cos(y) * x, name="called")(y)


@program(normal(4, 3))
def vmap_collectives(x):
    def f(x):
        y = (x - lax.pmean(x, "b")) * lax.axis_index("b").astype(x.dtype)
        return (
            y,
            lax.psum(1, "b"),
            lax.ppermute(x, "b", [(0, 1), (1, 0), (2, 3), (3, 2)]),
            lax.all_gather(x, "b").sum(0),
        )

    return jax.vmap(f, axis_name="b")(x)


@program(normal(4, 3), normal(3), diff=(0, 1))
def shard_map(x, w):
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P("i"), P()), out_specs=(P("i"), P()))
    def f(x, w):
        y = jnp.sin(x) * w
        return lax.ppermute(y, "i", [(k, (k + 1) % 4) for k in range(4)]), lax.psum(y.sum(), "i")

    return f(x, w)


@program(normal(4, 3))
def shard_map_loops(x):
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=P("i"), out_specs=P("i"))
    def f(x):
        return lax.scan(lambda c, _: (c * lax.pmean(jnp.cos(c), "i"), None), x, None, length=2)[0]

    return jax.jit(f)(x)


@program(normal(4, 3))
def sharding_constraint(x):
    return jnp.sin(lax.with_sharding_constraint(x * 2, NamedSharding(MESH, P("i"))))


BY_NAME = {p.name: p for p in CORPUS}
assert len(BY_NAME) == len(CORPUS), "two programs of one name"
