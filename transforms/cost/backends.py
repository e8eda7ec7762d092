"""A table for each backend of XLA: which operations it fuses.

The table for CPUs describes the programs of tests/trainings.py as JAX 0.12 compiles them, the table for GPUs the same programs on
an H200 with JAX 0.11.2. Sources: XLA's instruction_fusion.cc, and its priority_fusion.cc for GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Backend(NamedTuple):
    """The fusion rules of one backend of XLA.

    Attributes:
      cheap: primitives that are computed in each of their readers.
      expensive: primitives that are computed in their reader, if there is only one.
      reductions: primitives that draw in operands that only they read.
      drawn: primitives that they draw in, besides broadcasts.
      limit: the number of operations that they draw in.
      sharing: reductions and concatenations that compute their operands themselves, as elementwise operations do. Where there
        are any, a materialised value is read, never recomputed.
      ordered: library calls that read a copy of an operand in another order of axes than they take.
      workspace: the bytes that a large product of two matrices needs while it runs.
      has_barriers: whether recomputation in a backward pass is kept apart from the forward pass.
    """

    cheap: frozenset[str]
    expensive: frozenset[str]
    reductions: frozenset[str]
    drawn: frozenset[str] = frozenset()
    limit: int = 0
    sharing: frozenset[str] = frozenset()
    ordered: frozenset[str] = frozenset({"dot_general"})
    workspace: int = 0
    has_barriers: bool = True


def names(text: str) -> frozenset[str]:
    """The primitive names in a text."""
    return frozenset(text.split())


MOVES = names("broadcast_in_dim broadcast_to transpose rev pad slice split dynamic_slice gather")
REDUCTIONS = names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor")
_CHEAP = MOVES | names(
    """add sub add_any neg mul square integer_pow one_minus_square max min clamp sign abs floor ceil round is_finite eq ne lt le
    gt ge eq_to lt_to le_to and or xor not select_n population_count clz shift_left shift_right_logical shift_right_arithmetic
    convert_element_type reduce_precision real imag complex conj copy copy_p iota"""
)
_EXPENSIVE = names(
    """div rem exp exp2 expm1 log log1p log2 sqrt rsqrt cbrt pow logistic sin cos tan asin acos atan atan2 sinh cosh tanh asinh
    acosh atanh erf erfc erf_inv nextafter"""
)
_YNN = names(
    """add sub add_any neg mul square integer_pow max min abs exp tanh div sqrt rsqrt log convert_element_type dot_general
    reduce_sum reduce_max"""
)

BACKENDS = {
    # XLA:CPU hands clusters of operations to a library, YNNPACK, and does not count its temporaries. Up to JAX 0.10
    # it drops the barriers of jax.checkpoint outside of loops.
    "cpu": Backend(
        _CHEAP,
        _EXPENSIVE,
        REDUCTIONS,
        drawn=_YNN,
        limit=74,
        ordered=names("dot_general conv_general_dilated"),
        has_barriers=jax.__version_info__ >= (0, 11),
    ),
    # On GPUs a reduction is a kernel as any other: it computes its operands.
    "gpu": Backend(_CHEAP, _EXPENSIVE, frozenset(), sharing=REDUCTIONS | {"concatenate"}, workspace=2**25),
}
