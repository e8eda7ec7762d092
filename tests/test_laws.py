"""Laws that hold for every program, tried on random ones (`tests/programs.py`): about 100 in each run, the same ones each time.

The tier `slow` tries eight times as many. `FUNCGRAD_LAWS=40 pytest -n 2 --all tests/test_laws.py` tries 40 times as many in each
tier, and new ones each time (`--hypothesis-seed=0` repeats them). A failure prints the smallest recipe that hypothesis finds:
`Recipe(...).program()` holds its function and arguments.
"""

from __future__ import annotations

import functools
import itertools
import os
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax
from hypothesis import Phase, assume, given, seed, settings
from jax import lax

import funcgrad as fg

from .checks import (
    STEPS,
    TRANSFORMS,
    VERBS,
    assert_near,
    assert_same_error,
    assert_same_graph,
    assert_same_program,
    check_transform,
    identity_live,
    identity_rewrite,
    inexact,
    inexact_leaves,
    options,
    raised_by,
    summed,
    tangents,
)
from .corpus import FORWARD, REVERSE, SECOND
from .programs import BACKWARD, BLOCKS, CLOSED, GROUPS, IRREVERSIBLE, OPS, OWN, Block, Op, Recipe, recipes

TIMES = int(os.environ.get("FUNCGRAD_LAWS", "1"))
KEPT = 200  # programs after which what JAX compiled for them is dropped: thousands fill the memory
SETTINGS = settings(
    derandomize=TIMES == 1,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)
pytestmark = pytest.mark.timeout(300 * TIMES)
tried = itertools.count(1)


@pytest.fixture(params=[pytest.param(1, id="few"), pytest.param(8, id="many", marks=pytest.mark.slow)])
def law(request):
    """`law(label, examples)` is a decorator that tries a function of a recipe on many recipes; other labels draw others."""
    return functools.partial(try_law, request.param * TIMES)


def try_law(
    times: int, label: str, examples: int, without: frozenset[str] = frozenset(), often: frozenset[str] = frozenset()
):
    def run(check: Callable[[Recipe], None]) -> None:
        def holds(recipe):
            if next(tried) % KEPT == 0:
                jax.clear_caches()
            check(recipe)

        holds = settings(SETTINGS, max_examples=examples * times)(given(recipes(without, often))(holds))
        (seed(zlib.crc32(label.encode()))(holds) if TIMES == 1 else holds)()

    return run


def refused(transform: str) -> frozenset[str]:
    """What JAX cannot do under a transform."""
    in_reverse = IRREVERSIBLE if transform in REVERSE else frozenset()
    forward = BACKWARD if transform in FORWARD - SECOND else frozenset()
    return in_reverse | forward | ({"coarse"} if transform == "jacrev" else frozenset())  # it stacks all outputs


def settled(recipe: Recipe, graph: fg.Graph) -> fg.Graph:
    """The graph, built again where functions have rules of their own: JAX counts their constants (`num_consts`) only once."""
    return identity_rewrite(graph) if CLOSED & recipe.names() else graph


def leaves(f: Callable) -> Callable:
    """`f` with the list of its float outputs."""
    return lambda *args: inexact_leaves(f(*args))


def total(f: Callable) -> Callable:
    """`f` reduced to a scalar of its own precision."""
    return lambda *args: sum(jnp.sum(jnp.sin(x)) for x in leaves(f)(*args))


def inner(xs, ys):
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(xs), jax.tree.leaves(ys), strict=True))


def staged(f: Callable, *args) -> Callable:
    """JAX's own way from a function to its jaxpr and back."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    tree, run = jax.tree.structure(shape), jax.extend.core.jaxpr_as_fun(closed)
    again = lambda *args: jax.tree.unflatten(tree, run(*jax.tree.leaves(args)))
    again.jaxpr = closed
    return again


AS_JAXPR = SimpleNamespace(**{verb: getattr(jax, verb) for verb in VERBS}, trace=staged)


def refused_as_a_jaxpr(error: Exception, f: Callable, args: tuple):
    """JAX refuses the jaxpr as we refuse the Graph: it cannot differentiate a custom_jvp that it batched, of a constant.

    Where the cotangent of such a constant meets a jitted operation first, JAX names that, in a ValueError.
    """
    refusal = raised_by(jax.jit(f), args)
    assert isinstance(refusal, TypeError)
    if not (isinstance(error, ValueError) and "Expected cotangent type" in str(error)):
        assert_same_error(error, refusal)


# The same programs as JAX's own


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_functions_and_graphs_give_jax_programs(law, transform):
    @law(transform.name, 3, refused(transform.name))
    def _(recipe):
        p = recipe.program()
        check_transform(fg, transform, p, "function")
        try:
            check_transform(fg, transform, p, "graph")
        except (TypeError, ValueError) as e:
            refused_as_a_jaxpr(e, transform.of(AS_JAXPR, p, "graph"), transform.arguments(p))


def test_tracing(law):
    """It is deterministic, well typed, and leaves what is a Graph already as it is."""

    @law("tracing", 6)
    def _(recipe):
        p = recipe.program()
        graph = fg.verify(fg.trace(p.f, *p.args))
        assert graph.out_tree == jax.tree.structure(jax.eval_shape(p.f, *p.args))
        assert_same_graph(fg.trace(p.f, *p.args), graph)
        assert str(graph) == str(fg.trace(p.f, *p.args))
        graph = settled(recipe, graph)
        assert_same_graph(fg.trace(graph, *p.args), graph)


# Passes


def test_an_identity_rewrite_changes_nothing(law):
    @law("rewrite", 6)
    def _(recipe):
        p = recipe.program()
        graph = settled(recipe, fg.trace(p.f, *p.args))
        assert_same_graph(fg.verify(identity_rewrite(graph)), graph)
        assert_same_program(identity_rewrite(graph), p.f, p.args)


def test_an_identity_run_live_changes_nothing(law):
    @law("live", 6)
    def _(recipe):
        p = recipe.program()
        assert_same_program(identity_live(p.f), p.f, p.args)


@pytest.mark.parametrize("driver", ["rewrite", "live"])
def test_an_identity_changes_no_gradient(law, driver):
    @law(f"{driver} of a gradient", 4, IRREVERSIBLE)
    def _(recipe):
        p = recipe.program()
        f = summed(p.f)
        same = identity_live(f) if driver == "live" else identity_rewrite(fg.trace(f, *p.args))
        want = jax.grad(f, **options(p))
        assert_same_program(jax.grad(same, **options(p)), want, p.args, is_graph=driver == "rewrite")


ERF = frozenset({"erf"})
DERIVED = frozenset({"grad", "jvp", "custom_jvp", "custom_vjp"})  # what derives before the rules see it
FACTOR = jnp.linspace(0.9, 1.1, 3)


def scaled(x):
    """What stands for `erf`: it holds a sub-graph and a constant. Its type is weak where that of `erf` is, as a rule's is."""
    return _jax.cast(lax.erf(jax.jit(lambda x: x * FACTOR.sum().astype(x.dtype) / 3)(x)), jax.typeof(x))


SCALED = fg.Rules("scaled", {lax.erf_p: lambda eqn, x: scaled(x)})


def test_one_rule_has_one_meaning_for_both_drivers(law):
    @law("drivers", 4, often=ERF)
    def _(recipe):
        assume("erf" in recipe.names())
        p = recipe.program()
        rewritten = fg.verify(fg.rewrite(fg.trace(p.f, *p.args), SCALED))
        assert_same_program(rewritten, fg.live(p.f, SCALED), p.args, is_graph=True)


def test_a_rule_is_as_written_by_hand(law):
    @law("by hand", 3, DERIVED | IRREVERSIBLE, often=ERF)
    def _(recipe):
        assume("erf" in recipe.names())
        p, by_hand = recipe.program(), summed(recipe.program(erf=scaled).f)
        f = summed(p.f)
        assert_same_program(fg.live(f, SCALED), by_hand, p.args, is_graph=True)
        want = jax.grad(by_hand, **options(p))
        assert_same_program(fg.grad(f, **options(p), rules=SCALED), want, p.args, is_graph=True)


# Derivatives and batches, in double precision


def test_gradients_agree_with_finite_differences(law):
    @law("differences", 2, IRREVERSIBLE | OWN | {"rough", "discrete", "coarse"})
    def _(recipe):
        with jax.enable_x64(True):
            x, *rest = recipe.arguments(np.float64)
            f = total(recipe.program(np.float64).f)
            along = jax.tree.map(jnp.asarray, tangents(x))
            at = jax.jit(lambda h: f(jax.tree.map(lambda x, t: x + h * t, x, along), *rest))
            want = (8 * (at(1e-3) - at(-1e-3)) - (at(2e-3) - at(-2e-3))) / 12e-3
            for form in (f, fg.trace(f, x, *rest)):
                assert_near(inner(jax.jit(fg.grad(form))(x, *rest), along), want, 1e-6)


def test_loops_are_reversed_as_they_are_pushed(law):
    """Loops inside of all else, and all else inside of loops: the reverse mode that JAX lacks, by its forward mode."""

    @law("loops", 2, OWN | BACKWARD | {"rough", "discrete", "coarse"}, often=IRREVERSIBLE)
    def _(recipe):
        assume(IRREVERSIBLE & recipe.names())
        with jax.enable_x64(True):
            x, *rest = recipe.arguments(np.float64)
            f = total(recipe.program(np.float64).f)
            want = jax.jit(jax.jacfwd(f))(x, *rest)
            for form in (f, fg.trace(f, x, *rest)):
                assert_near(jax.jit(fg.grad(form, loops=fg.Loops(2, 2)))(x, *rest), want, 1e-9)


def test_forward_and_reverse_mode_are_dual(law):
    """⟨vjp(ct), t⟩ = ⟨ct, jvp(t)⟩, and linearize pushes as jvp does."""

    @law("dual", 2, IRREVERSIBLE | BACKWARD | {"coarse"})
    def _(recipe):
        with jax.enable_x64(True):
            p = recipe.program(np.float64)

            @jax.jit
            def products(x, *rest):
                t, found = tangents(x), []
                for form in (inexact(p.f), fg.trace(inexact(p.f), x, *rest)):
                    g = lambda x: form(x, *rest)
                    out, pull = fg.vjp(g, x)
                    ct = tangents(out)
                    found += [inner(pull(ct), t), inner(ct, fg.jvp(g, (x,), (t,))[1])]
                    found += [inner(ct, fg.linearize(g, x)[1](t))]
                return found

            try:
                first, *others = products(*p.args)
            except (TypeError, ValueError) as e:
                as_jaxpr = staged(inexact(p.f), *jax.tree.map(jnp.asarray, p.args))
                pulled = lambda x, *rest: (lambda out, pull: pull(tangents(out)))(
                    *jax.vjp(lambda x: as_jaxpr(x, *rest), x)
                )
                refused_as_a_jaxpr(e, pulled, p.args)
                return
            assert_near(others, [first] * len(others), 1e-9)


def test_grad_and_vmap_commute(law):
    """The gradient of a batch holds the gradients of its examples: of a Graph by one order, of the function by the other."""

    @law("commute", 2, IRREVERSIBLE | {"rough", "discrete", "coarse"})
    def _(recipe):
        with jax.enable_x64(True):
            p = recipe.program(np.float64)
            f = total(p.f)
            x, *rest = jax.tree.map(jnp.asarray, p.args)
            axes = (0, None, None, None)
            batched = fg.vmap(fg.trace(f, x, *rest), axes, axis_size=STEPS)

            @jax.jit
            def both(*args):
                return fg.grad(lambda *args: jnp.sum(batched(*args)))(*args), fg.vmap(fg.grad(f), axes)(*args)

            args = jax.tree.map(lambda x: jnp.stack([x, x / 2, -x]), x), *rest
            try:
                outside, inside = both(*args)
            except (TypeError, ValueError) as e:
                as_jaxpr = staged(jax.vmap(f, axes), *args)
                refused_as_a_jaxpr(e, jax.grad(lambda *args: jnp.sum(as_jaxpr(*args))), args)
                return
            assert_near(outside, inside, 1e-9)


# The grammar itself


@pytest.mark.parametrize("group", [*GROUPS, "blocks"])
def test_each_step_alone(group):
    for name in GROUPS.get(group, BLOCKS):
        step = Op(name) if name in OPS else Block(name, 0, 0, (Op("erf"), Op("erf")), (Op("sin"),))
        p = Recipe("matrix", (Op("sin"), step), 0).program()
        graph = fg.verify(fg.trace(p.f, *p.args))
        assert_same_graph(identity_rewrite(graph), graph)


@pytest.mark.parametrize("block", BLOCKS)
def test_rules_reach_into_each_block(block):
    """A right rule is as written by hand, or means the same to both drivers; a slightly wrong one is found out."""
    inside = (Op("erf"), Op("erf"))
    recipe = Recipe("vector", (Block(block, 0, 0, inside, inside),))
    p = recipe.program()
    graph = fg.trace(p.f, *p.args)
    wrong = fg.Rules("wrong", {lax.erf_p: lambda eqn, x: scaled(x) * (1 + 1e-5)})
    by_hand = recipe.program(erf=scaled).f if block not in DERIVED else fg.live(p.f, SCALED)
    checks = [(lambda rules: fg.live(p.f, rules), by_hand), (lambda rules: fg.rewrite(graph, rules), by_hand)]
    if block not in DERIVED | IRREVERSIBLE:
        gradient = jax.grad(summed(by_hand), **options(p))
        checks += [(lambda rules: fg.grad(summed(p.f), **options(p), rules=rules), gradient)]
    for run, want in checks:
        assert_same_program(run(SCALED), want, p.args, is_graph=True)
        with pytest.raises(AssertionError):
            assert_same_program(run(wrong), want, p.args, is_graph=True)
