"""Random programs: `recipes()` draws a `Recipe`, plain data that prints as the code that makes it; `program` runs it.

A recipe is a list of steps. A step takes its operands among the values before it, counted back from the latest, and adds what it
computes. Every recipe is a program: a number too large wraps around, and a value of another shape or dtype than a step needs
is cut, repeated or cast. So hypothesis may draw and shrink without asking.

Values are of four kinds: "f" floats, "i" integers, "b" booleans, "k" random keys. Shapes stay small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from .corpus import Program

KINDS = {"f": jnp.floating, "i": jnp.integer, "b": jnp.bool_, "k": jax.dtypes.prng_key}
SHAPES = {"scalar": (), "vector": (3,), "matrix": (2, 3)}  # of inputs; "weak" is a Python number
Values = list[Any]


# Values


def pick(values: Sequence[Any], kind: str = "f", k: int = 0) -> Any:
    """The k-th value of a kind, counted back from the latest and around."""
    found = [x for x in values if jnp.issubdtype(x.dtype, KINDS[kind])]
    return found[-1 - k % len(found)]


def like(x: Any, other: Any) -> Any:
    """`x` in the shape and dtype of `other`: cast, cut or repeated where they differ. JAX hands rules Python numbers too."""
    x, other = jnp.asarray(x), jnp.asarray(other)
    x = x if x.dtype == other.dtype else x.astype(other.dtype)
    return x if x.shape == other.shape else jnp.resize(x, other.shape)


def flat(x: Any) -> Any:
    return x.reshape(-1)


def rows(x: Any) -> Any:
    return jnp.resize(x, (3, 2))


def small(x: Any) -> Any:
    """`x`, or a few of its elements: loops inside loops must not make values grow."""
    return x if x.size <= 24 and x.ndim <= 3 else flat(x)[:6]


def index(n: Any, size: int) -> Any:
    return flat(n)[0].astype(jnp.int32) % size


def start(n: Any) -> tuple:
    """Where a slice of `rows` begins."""
    return index(n, 3), jnp.int32(0)


def indices(n: Any, size: int) -> Any:
    return flat(n).astype(jnp.int32) % size


def spread(x: Any) -> Any:
    """A closed-over constant of the shape of `x`."""
    return np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape).astype(x.dtype)


# Operations: the kinds of their operands, and what they compute. Values stay of order one where a function grows fast.

SMOOTH = {
    "sin": ("f", lax.sin),
    "cos": ("f", lax.cos),
    "tanh": ("f", lax.tanh),
    "logistic": ("f", lax.logistic),
    "erf": ("f", lax.erf),
    "atan": ("f", lax.atan),
    "asinh": ("f", lax.asinh),
    "neg": ("f", lax.neg),
    "exp": ("f", lambda x: lax.exp(lax.tanh(x))),
    "log": ("f", lambda x: jnp.log1p(x * x)),
    "sqrt": ("f", lambda x: lax.sqrt(1 + x * x)),
    "rsqrt": ("f", lambda x: lax.rsqrt(1 + x * x)),
    "cube": ("f", lambda x: lax.tanh(x) ** 3),
    "lgamma": ("f", lambda x: lax.lgamma(1 + lax.logistic(x))),
    "silu": ("f", jax.nn.silu),  # with a JVP rule of its own
    "constant": ("f", lambda x: x * spread(x)),
    "add": ("ff", lambda x, y: x + like(y, x)),
    "sub": ("ff", lambda x, y: x - like(y, x)),
    "mul": ("ff", lambda x, y: x * lax.tanh(like(y, x))),
    "div": ("ff", lambda x, y: x / (1 + y.mean().astype(x.dtype) ** 2)),
    "pow": ("ff", lambda x, y: lax.pow(0.5 + lax.logistic(x), lax.tanh(like(y, x)))),
    "atan2": ("ff", lambda x, y: lax.atan2(x, 1 + like(y, x) ** 2)),
    "logaddexp": ("ff", lambda x, y: jnp.logaddexp(x, like(y, x))),
    "complex": ("ff", lambda x, y: lax.real(lax.exp(lax.complex(*wide(lax.tanh(x), like(y, x)))))),
    "barrier": ("ff", lambda x, y: lax.optimization_barrier((x, y))),
    # reductions and contractions
    "sum": ("f", lambda x: x.sum(range(x.ndim)[:1])),
    "sum_all": ("f", lambda x: jnp.sum(x)),
    "mean": ("f", lambda x: x.mean(range(x.ndim)[-1:], keepdims=True)),
    "prod": ("f", lambda x: lax.tanh(x).prod(range(x.ndim)[:1])),
    "logsumexp": ("f", lambda x: jax.nn.logsumexp(x)),
    "softmax": ("f", lambda x: jax.nn.softmax(flat(x))),
    "cumsum": ("f", lambda x: lax.cumsum(flat(x), reverse=True)),
    "cumprod": ("f", lambda x: lax.cumprod(lax.tanh(flat(x)))),
    "cumlogsumexp": ("f", lambda x: lax.cumlogsumexp(flat(x))),
    "associative_scan": ("f", lambda x: lax.associative_scan(lambda a, b: a * 0.5 + b, flat(x))),
    "dot": ("ff", lambda x, y: jnp.dot(flat(x), flat(like(y, x)))),
    "matmul": ("ff", lambda x, y: rows(x) @ rows(y).T.astype(x.dtype)),
    "batched_dot": ("ff", lambda x, y: jnp.einsum("ij,ij->i", rows(x), rows(y).astype(x.dtype))),
    "convolve": ("ff", lambda x, y: jnp.convolve(flat(x), flat(y)[:2].astype(x.dtype), mode="same")),
    # shapes and indices
    "ravel": ("f", flat),
    "transpose": ("f", jnp.transpose),
    "expand": ("f", lambda x: x[None]),
    "broadcast": ("f", lambda x: jnp.broadcast_to(x, (2, *x.shape))),
    "slice": ("f", lambda x: flat(x)[::-2]),
    "reverse": ("f", lambda x: lax.rev(x, range(x.ndim))),
    "roll": ("f", lambda x: jnp.roll(x, 1)),
    "pad": ("f", lambda x: lax.pad(flat(x), jnp.zeros((), x.dtype), ((1, -1, 1),))),
    "tril": ("f", lambda x: jnp.tril(rows(x))),
    "concatenate": ("ff", lambda x, y: jnp.concatenate([flat(x), flat(y).astype(x.dtype)])),
    "stack": ("ff", lambda x, y: jnp.stack([x, like(y, x)], axis=-1)),
    "gather": ("fi", lambda x, n: flat(x)[indices(n, x.size)]),
    "take_along": ("fi", lambda x, n: jnp.take_along_axis(flat(x), indices(n, x.size), 0)),
    "element": ("fi", lambda x, n: lax.dynamic_index_in_dim(flat(x), index(n, x.size), keepdims=False)),
    "dynamic_slice": ("fi", lambda x, n: lax.dynamic_slice(rows(x), start(n), (2, 2))),
    "dynamic_update": (
        "ffi",
        lambda x, y, n: lax.dynamic_update_slice(rows(x), rows(like(y, x))[:1], start(n)),
    ),
    "scatter_add": ("ffi", lambda x, y, n: flat(x).at[indices(n, x.size)].add(flat(y)[0].astype(x.dtype))),
    "scatter_set": ("ffi", lambda x, y, n: flat(x).at[index(n, x.size)].set(flat(y)[0].astype(x.dtype))),
    "scatter_mul": ("ffi", lambda x, y, n: flat(x).at[index(n, x.size)].multiply(lax.tanh(flat(y)[0].astype(x.dtype)))),
    "segment_sum": ("fi", lambda x, n: jax.ops.segment_sum(flat(x), indices(like(n, x.astype(n.dtype)), 2), 2)),
}

ROUGH = {  # steps, kinks, and what is no derivative at all
    "abs": ("f", lax.abs),
    "sign": ("f", lax.sign),
    "floor": ("f", lax.floor),
    "round": ("f", lax.round),
    "relu": ("f", jax.nn.relu),
    "clip": ("f", lambda x: jnp.clip(x, -0.5, 0.5)),
    "max": ("ff", lambda x, y: jnp.maximum(x, like(y, x))),
    "min": ("ff", lambda x, y: lax.min(x, like(y, x))),
    "rem": ("f", lambda x: lax.rem(x, jnp.full_like(x, 0.7))),
    "where": ("bff", lambda p, x, y: jnp.where(jnp.resize(p, x.shape), x, like(y, x))),
    "select": ("ff", lambda x, y: lax.select(x > 0, x, like(y, x))),
    "reduce_max": ("f", lambda x: x.max(range(x.ndim)[:1])),
    "reduce_min": ("f", lambda x: jnp.min(x)),
    "cummax": ("f", lambda x: lax.cummax(flat(x))),
    "sort": ("f", lambda x: jnp.sort(flat(x))),
    "sort_pairs": ("ff", lambda x, y: lax.sort((flat(x), flat(like(y, x))), num_keys=1)[1]),
    "top_k": ("f", lambda x: lax.top_k(flat(x), 1)),
    "scatter_max": ("ffi", lambda x, y, n: flat(x).at[index(n, x.size)].max(flat(y)[0].astype(x.dtype))),
    "pool": ("f", lambda x: lax.reduce_window(rows(x), -np.inf, lax.max, (2, 1), (1, 1), "VALID")),
    "stop_gradient": ("f", lax.stop_gradient),
}

DISCRETE = {  # integers, booleans, and between kinds
    "less": ("ff", lambda x, y: x < like(y, x)),
    "equal": ("fi", lambda x, n: x == like(n, x)),
    "is_finite": ("f", lax.is_finite),
    "and": ("bb", lambda p, q: p & like(q, p)),
    "not": ("b", jnp.logical_not),
    "any": ("b", jnp.any),
    "to_int": ("f", lambda x: jnp.clip(3 * x, -9, 9).astype(jnp.int32)),
    "to_bool": ("i", lambda n: n > 0),
    "to_float": ("if", lambda n, x: like(n % 5, x)),
    "bool_to_float": ("bf", like),
    "int_add": ("ii", lambda n, m: n + like(m, n)),
    "int_mul": ("ii", lambda n, m: n * like(m, n)),
    "int_div": ("ii", lambda n, m: n // (1 + jnp.abs(like(m, n) % 7))),
    "xor": ("ii", lambda n, m: lax.bitwise_xor(n, like(m, n))),
    "shift": ("i", lambda n: lax.shift_right_arithmetic(n, jnp.ones_like(n))),
    "population_count": ("i", lax.population_count),
    "argmax": ("f", lambda x: lax.argmax(flat(x), 0, jnp.int32)),
    "argsort": ("f", lambda x: jnp.argsort(flat(x)).astype(jnp.int32)),
    "one_hot": ("if", lambda n, x: jax.nn.one_hot(n % 3, 3, dtype=x.dtype)),
    "iota": ("i", lambda n: n + lax.broadcasted_iota(n.dtype, (2, *n.shape), 0)),
    "bits": ("f", lambda x: lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)),
}

RANDOM = {
    "split": ("k", lambda k: list(jax.random.split(k))),
    "fold_in": ("ki", lambda k, n: jax.random.fold_in(k, index(n, 99))),
    "uniform": ("kf", lambda k, x: x * jax.random.uniform(k, x.shape, x.dtype)),
    "dropout": ("kf", lambda k, x: jnp.where(jax.random.bernoulli(k, 0.8, x.shape), x, jnp.zeros_like(x))),
    "key_data": ("k", lambda k: lax.bitcast_convert_type(jax.random.key_data(k), jnp.int32)),
}

COARSE = {  # of few digits
    "bfloat16": ("f", lambda x: x.astype(jnp.bfloat16)),
    "float16": ("f", lambda x: x.astype(jnp.float16)),
    "float32": ("f", lambda x: x.astype(jnp.float32)),
    "reduce_precision": ("f", lambda x: lax.reduce_precision(x, 5, 10)),
}

GROUPS = {"smooth": SMOOTH, "rough": ROUGH, "discrete": DISCRETE, "random": RANDOM, "coarse": COARSE}
OPS = {name: op for group in GROUPS.values() for name, op in group.items()}
assert len(OPS) == sum(map(len, GROUPS.values())), "two operations of one name"


def wide(*xs: Any) -> tuple:
    """Floats that can be parts of complex numbers."""
    return tuple(x if x.dtype == jnp.float64 else x.astype(jnp.float32) for x in xs)


# Blocks: control flow and functions around other steps. `body(*inputs)` gives all values at the end of its steps.


def _scan(body, _, x, y, **options):
    def step(carry, row):
        values = body(carry["c"], row)
        return {"c": like(pick(values), carry["c"]), "n": (carry["n"][0] + 1, None)}, pick(values, k=1)

    carry, ys = lax.scan(step, {"c": x, "n": (jnp.int32(0), None)}, rows(y), **options)
    return ys, carry["n"][0], carry["c"]


def _while(body, _, x):
    step = lambda s: (s[0] + 1, like(pick(body(s[0], s[1])), x))
    return lax.while_loop(lambda s: (s[0] < 3) & (jnp.sum(s[1]) < 9), step, (jnp.int32(0), x))


def _branches(body, other, x):
    both = lambda f: lambda x: ({"sum": jnp.sum(x), "none": None}, like(pick(f(x)), x))
    return both(body), both(other), lambda x: ({"sum": x.min(), "none": None}, x)


def _called(transform):
    """A block that calls a transformed body, once or twice."""

    def call(body, _, *xs):
        f = transform(lambda x: pick(body(x)))
        return [f(like(x, xs[0])) for x in xs]

    return call


def _custom_jvp(body, _, x, y):
    plain = lambda x, y: (pick(values := body(x, y)), pick(values, k=1))
    f = jax.custom_jvp(plain)
    f.defjvp(lambda primals, tangents: jax.jvp(jax.jit(plain), primals, tangents))
    return f(x, y)


def _custom_vjp(body, _, x, y):
    plain = lambda x, y: {"out": pick(body(x, y)), "none": None}
    f = jax.custom_vjp(plain)
    f.defvjp(lambda x, y: jax.vjp(jax.jit(plain), x, y), lambda pull, ct: pull(ct))
    return f(x, y)


def _own_jvp(body, _, x, y):
    """A derivative that is none of the function: what counts is that it is used."""
    f = jax.custom_jvp(lambda x, y: pick(body(x, y)))

    @f.defjvp
    def _(primals, tangents):
        out = f(*primals)
        return out, like(tangents[0], out) * like(pick(body(*primals[::-1])), out)

    return f(x, y)


def _own_vjp(body, _, x, y):
    plain = lambda x, y: pick(body(x, y))
    f = jax.custom_vjp(plain)
    pulled = lambda xy, ct: tuple(like(ct, v) * like(pick(body(*xy[::-1])), v) for v in xy)
    f.defvjp(lambda x, y: (plain(x, y), (x, y)), pulled)
    return f(x, y)


def _named_scope(body, _, x):
    with jax.named_scope("scope"):
        return pick(body(x))


BLOCKS = {
    "scan": ("ff", _scan),
    "scan_reversed": ("ff", functools.partial(_scan, reverse=True, unroll=2)),
    "fori_loop": ("f", lambda body, _, x: lax.fori_loop(0, 3, lambda i, c: like(pick(body(i, c)), c), x)),
    "while_loop": ("f", _while),
    "map": ("f", lambda body, _, x: lax.map(lambda row: pick(body(row)), rows(x))),
    "cond": ("bf", lambda body, other, p, x: lax.cond(jnp.any(p), *_branches(body, other, x)[:2], x)),
    "switch": ("if", lambda body, other, n, x: lax.switch(index(n, 3), _branches(body, other, x), x)),
    "jit": ("f", _called(jax.jit)),
    "jit_twice": ("ff", _called(jax.jit)),
    "jit_inline": ("f", _called(functools.partial(jax.jit, inline=True))),
    "checkpoint": ("f", _called(jax.checkpoint)),
    "checkpoint_dots": ("ff", _called(functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable))),
    "custom_jvp": ("ff", _custom_jvp),
    "custom_vjp": ("ff", _custom_vjp),
    "own_jvp": ("ff", _own_jvp),
    "own_vjp": ("ff", _own_vjp),
    "vmap": ("ff", lambda body, _, x, y: jax.vmap(lambda row, y: pick(body(row, y)), (0, None))(rows(x), y)),
    "named_scope": ("f", _named_scope),
    "grad": ("f", lambda body, _, x: jax.grad(lambda x: jnp.sum(pick(body(x))))(x)),
    "jvp": ("f", lambda body, _, x: jax.jvp(lambda x: pick(body(x)), (x,), (x,))),
}
BRANCHES = ("cond", "switch")
OWN = frozenset({"own_jvp", "own_vjp"})
CLOSED = {"custom_jvp", "custom_vjp", *OWN}  # JAX lets these read nothing that is being differentiated around them

IRREVERSIBLE = frozenset({"while_loop"})  # what JAX refuses in reverse mode
BACKWARD = frozenset({"custom_vjp", "own_vjp"})  # what JAX refuses in forward mode
INSIDE = {  # what may not stand inside of a block: what JAX refuses, and derivatives of derivatives
    "grad": IRREVERSIBLE | {"grad", "jvp"},
    "jvp": BACKWARD | {"grad", "jvp"},
    "custom_jvp": BACKWARD,
    "own_jvp": BACKWARD,
    "own_vjp": BACKWARD,
}


# Recipes


@dataclass(frozen=True)
class Op:
    """One operation on earlier values; operands beyond the second are the latest of their kind."""

    name: str
    x: int = 0
    y: int = 0

    def __repr__(self) -> str:
        return f"Op({self.name!r}, {self.x}, {self.y})"


@dataclass(frozen=True)
class Block:
    """Control flow, or a transformed function, around steps; `other` is the second branch where there are branches."""

    name: str
    x: int = 0
    y: int = 0
    body: tuple[Op | Block, ...] = ()
    other: tuple[Op | Block, ...] = ()

    def __repr__(self) -> str:
        bodies = ", ".join(repr(steps) for steps in (self.body, self.other) if steps)
        return f"Block({self.name!r}, {self.x}, {self.y}, {bodies})"


@dataclass(frozen=True)
class Recipe:
    """A program of (floats, integers, boolean, key); its result is the latest float and a tree of other values.

    Attributes:
      inputs: the tree of the floats, leaves named as in `SHAPES`.
      steps: what it computes.
      outputs: a tree of numbers, which values to return.
      seed: for the values of the arguments.
    """

    inputs: Any
    steps: tuple[Op | Block, ...]
    outputs: Any = None
    seed: int = 0

    def arguments(self, dtype: Any = np.float32) -> tuple:
        random = np.random.default_rng(self.seed)
        value = lambda name: 0.7 if name == "weak" else jnp.asarray(0.5 * random.standard_normal(SHAPES[name]), dtype)
        integers = jnp.asarray(random.integers(0, 9, 3), np.int32)
        return jax.tree.map(value, self.inputs), integers, jnp.bool_(self.seed % 2), jax.random.key(self.seed)

    def program(self, dtype: Any = np.float32, **ops: Callable) -> Program:
        """The program, with operations replaced by others of the same operands."""
        table = OPS | {name: (OPS[name][0], f) for name, f in ops.items()}

        def f(x, n, p, key):
            values = _run(self.steps, [*(jnp.asarray(v) for v in (n, p, key, *jax.tree.leaves(x)))], table)
            return pick(values), jax.tree.map(lambda k: values[-1 - k % len(values)], self.outputs)

        return Program(repr(self), f, self.arguments(dtype))

    def names(self) -> set[str]:
        """The operations and blocks that occur."""
        return {step.name for step in _walk(self.steps)}


def _walk(steps: Sequence[Op | Block]) -> Iterator[Op | Block]:
    for step in steps:
        yield step
        if isinstance(step, Block):
            yield from _walk(step.body)
            yield from _walk(step.other)


def _run(steps: Sequence[Op | Block], values: Values, table: Mapping[str, tuple[str, Callable]]) -> Values:
    """The values, and after them those that the steps compute."""
    for step in steps:
        kinds, f = table[step.name] if isinstance(step, Op) else BLOCKS[step.name]
        operands = [pick(values, kind, k) for kind, k in zip(kinds, (step.x, step.y, 0), strict=False)]
        if isinstance(step, Block):
            operands = [*(_body(s, step.name, values, table) for s in (step.body, step.other)), *operands]
        values = [*values, *map(small, jax.tree.leaves(f(*operands)))]
    return values


def _body(steps: Sequence[Op | Block], block: str, values: Values, table: Mapping) -> Callable[..., Values]:
    """The steps inside of a block as a function: it reads the values outside too, where JAX lets it."""
    constants = lambda: [jnp.asarray([2, 0, 1], jnp.int32), jnp.bool_(True), jax.random.key(1)]
    return lambda *xs: _run(steps, [*(constants() if block in CLOSED else values), *map(jnp.asarray, xs)], table)


@functools.cache
def _steps(depth: int, without: frozenset[str], often: frozenset[str]) -> st.SearchStrategy:
    number = st.integers(0, 4)
    groups = [group for name, group in GROUPS.items() if name not in without]
    groups += [often - BLOCKS.keys()] * bool(often - BLOCKS.keys())
    choices = [st.builds(Op, st.sampled_from(sorted(group)), number, number) for group in groups]
    if depth:
        plain = [name for name in BLOCKS if name not in {*without, *INSIDE, *BRANCHES}]
        nested = [(plain, without), *(([name], without | INSIDE[name]) for name in INSIDE if name not in without)]
        for names, barred in (*nested, *(([name], without) for name in sorted(often & BLOCKS.keys() - without))):
            inner = _steps(depth - 1, barred, often)
            choices.append(st.builds(Block, st.sampled_from(names), number, number, inner))
        inner = _steps(depth - 1, without, often)
        choices.append(st.builds(Block, st.sampled_from(BRANCHES), number, number, inner, inner))
    return st.lists(st.one_of(choices), min_size=1, max_size=3 + depth).map(tuple)


def _trees(leaf: st.SearchStrategy) -> st.SearchStrategy:
    leaf = leaf | st.none()
    nodes = lambda of: st.lists(of, max_size=2).map(tuple) | st.dictionaries(st.sampled_from("ab"), of)
    return leaf | nodes(leaf | nodes(leaf))


def recipes(
    without: frozenset[str] = frozenset(), often: frozenset[str] = frozenset(), depth: int = 2
) -> st.SearchStrategy[Recipe]:
    """Recipes without the named blocks and groups of operations, with those named `often`, nested `depth` deep."""
    shape = st.sampled_from([*SHAPES, "weak"])
    inputs = shape | st.tuples(_trees(shape), shape)
    return st.builds(Recipe, inputs, _steps(depth, without, often), _trees(st.integers(0, 4)), st.integers(0, 9))
