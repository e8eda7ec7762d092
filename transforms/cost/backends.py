"""What the backends of XLA fuse: a table for each.

The one for CPUs was read off the programs of tests/trainings.py as JAX 0.12 compiles them, the one for GPUs off the same programs
on an H200 with JAX 0.11.2. Sources: XLA's instruction_fusion.cc, and its priority_fusion.cc for GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Backend(NamedTuple):
    """What one backend of XLA fuses.

    Attributes:
      cheap: primitives that are computed where they are read, however often.
      expensive: those that are computed where they are read, if that is one place.
      reductions: those that draw in what only they read.
      drawn: what they draw in; broadcasts too.
      limit: how many operations they draw in.
      sharing: reductions, and what joins, that compute what they read themselves, as elementwise operations do. Where there are
        any, a value that has memory is read rather than computed again.
      ordered: library calls that read a copy where an operand has its axes in another order than they take.
      workspace: the bytes that a large product of two matrices needs while it runs.
      has_barriers: whether what a backward pass computes again is kept apart.
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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names("broadcast_in_dim broadcast_to transpose rev pad slice split dynamic_slice gather")
REDUCTIONS = _names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor")
_CHEAP = MOVES | _names(
    """add sub add_any neg mul square integer_pow one_minus_square max min clamp sign abs floor ceil round is_finite eq ne lt le
    gt ge eq_to lt_to le_to and or xor not select_n population_count clz shift_left shift_right_logical shift_right_arithmetic
    convert_element_type reduce_precision real imag complex conj copy copy_p iota"""
)
_EXPENSIVE = _names(
    """div rem exp exp2 expm1 log log1p log2 sqrt rsqrt cbrt pow logistic sin cos tan asin acos atan atan2 sinh cosh tanh asinh
    acosh atanh erf erfc erf_inv nextafter"""
)
_YNN = _names(
    """add sub add_any neg mul square integer_pow max min abs exp tanh div sqrt rsqrt log convert_element_type dot_general
    reduce_sum reduce_max"""
)

BACKENDS = {
    # XLA:CPU hands clusters of operations to a library, YNNPACK, of which it knows no temporaries. Up to JAX 0.10
    # it lost the barriers of jax.checkpoint outside of loops.
    "cpu": Backend(
        _CHEAP,
        _EXPENSIVE,
        REDUCTIONS,
        drawn=_YNN,
        limit=74,
        ordered=_names("dot_general conv_general_dilated"),
        has_barriers=jax.__version_info__ >= (0, 11),
    ),
    # On GPUs a reduction is a kernel as any other: it computes what it reads.
    "gpu": Backend(_CHEAP, _EXPENSIVE, frozenset(), sharing=REDUCTIONS | {"concatenate"}, workspace=2**25),
}
