"""What one operation costs: its FLOPs and transcendentals by primitive, its bytes by its operands.

The table below has one line per family of primitives. The work of a primitive that is on no line is unknown.

- A FLOP is one arithmetic operation on numbers of any type, comparison, selection and conversion among them, as XLA's
  `HloCostAnalysis` counts; a multiply-add is two. A complex multiplication is 6 FLOPs, an addition 2.
- Functions that hardware approximates (exp, log, tanh, …) are counted apart, one transcendental per element.
- Bytes are those of the operands and results of each equation, without fusion. Slices and gathers read as much as they return;
  updates write as much as they change; views (changes of shape) have none.

Sources:
  Golub & Van Loan 2013, Matrix Computations, 4th edition, ISBN 9781421407944: triangular solve (3.1), LU (3.2), Cholesky (4.2),
  Householder QR (5.2), Hessenberg and Schur (7.4, 7.5), symmetric eigenproblem (8.3), SVD (8.6).
  Van Loan 1992, Computational Frameworks for the FFT, doi:10.1137/1.9781611970999: 5 n log₂ n, half of it for real values.
  Salmon et al. 2011, Parallel random numbers, doi:10.1145/2063384.2063405: the 20 rounds of threefry2x32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..core import _jax

Rule = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs, transcendentals, bytes read and bytes written."""

    flops: float = 0
    transcendentals: float = 0
    bytes_read: float = 0
    bytes_written: float = 0

    @classmethod
    def sum(cls, works: Iterable[Work]) -> Work:
        """All of them together."""
        works = list(works)
        return cls(*(sum(getattr(w, name) for w in works) for name in cls.__slots__))

    def times(self, n: float) -> Work:
        """The same work, done `n` times."""
        return Work(self.flops * n, self.transcendentals * n, self.bytes_read * n, self.bytes_written * n)

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


def work(eqn: Any) -> Work | None:
    """The work of one run of an equation without sub-jaxprs; None where it is unknown."""
    name = eqn.primitive.name
    if name == "pallas_call":
        return _declared(eqn)
    counts = _RULES[name](eqn) if name in _RULES else None
    if counts is None:
        return None
    flops, transcendentals = counts if isinstance(counts, tuple) else (counts, 0)
    return Work(flops, transcendentals, *_traffic(eqn))


def is_view(eqn: Any) -> bool:
    """Whether the results of an equation are its operands, of another shape or name."""
    if eqn.primitive.name == "convert_element_type":  # from a weak type to its own
        return eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype
    return eqn.primitive.name in _VIEWS


def nbytes(aval: Any) -> int:
    """The bytes of an array, of keys too, and of the array that a reference holds; 0 for tokens."""
    aval = getattr(aval, "inner_aval", aval)
    dtype = getattr(aval, "dtype", None)
    return 0 if dtype is None else math.prod(aval.shape) * dtype.itemsize


# ------------------------------------------------------------------------------------------------ rules
# A rule maps an equation to its FLOPs, or to (FLOPs, transcendentals), or to None where these are unknown.


def _size(v: Any) -> int:
    return math.prod(getattr(v.aval, "shape", ()))


def _out(eqn: Any) -> int:
    return sum(map(_size, eqn.outvars))


def _is_complex(v: Any) -> bool:
    return jax.dtypes.issubdtype(v.aval.dtype, np.complexfloating)


def _elementwise(real: int, complex_: int) -> Rule:
    """So many FLOPs per element of a real and of a complex result."""
    return lambda eqn: _out(eqn) * (complex_ if _is_complex(eqn.outvars[0]) else real)


_additive, _multiplicative = _elementwise(1, 2), _elementwise(1, 6)


def _power(eqn: Any) -> int:
    """Repeated squaring, and a division for a negative exponent."""
    n = abs(eqn.params["y"])
    multiplications = n.bit_length() - 1 + n.bit_count() - 1 if n else 0
    return (multiplications + (eqn.params["y"] < 0)) * _multiplicative(eqn)


def _contraction(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
    return (8 if _is_complex(eqn.outvars[0]) else 2) * _out(eqn) * depth


def _ragged(eqn: Any) -> int:
    """Each row meets the matrix of its group, or each row is contracted once: [m, k] by [g, k, n], or [m, k] by [m, n]."""
    (contracted, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    rows = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions[0]
    groups = eqn.invars[2].aval.shape[-1] if rows in contracted else 1
    depth = math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
    return 2 * _out(eqn) * depth // max(groups, 1)


def _convolution(eqn: Any) -> int:
    """Multiply-adds with elements of the input alone: none with padding, nor with the holes of a dilation."""
    p, (image, kernel) = eqn.params, [v.aval.shape for v in eqn.invars]
    lhs, rhs, out = p["dimension_numbers"]
    result = eqn.outvars[0].aval.shape
    pairs = 1
    for k, (stride, (low, _), holes, apart) in enumerate(
        zip(p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True)
    ):
        at = np.arange(result[out[k + 2]])[:, None] * stride + np.arange(kernel[rhs[k + 2]]) * apart - low
        pairs *= int(np.sum((at >= 0) & (at % holes == 0) & (at < image[lhs[k + 2]] * holes)))
    channels = kernel[rhs[0]] * kernel[rhs[1]]  # of the input per group, times those of the result
    batch = image[lhs[0]] // p["batch_group_count"]
    return (8 if _is_complex(eqn.outvars[0]) else 2) * pairs * channels * batch


def _reduced(eqn: Any) -> int:
    """How many elements a reduction combines into others."""
    return max(_size(eqn.invars[0]) - _size(eqn.outvars[0]), 0)


def _reduction(eqn: Any) -> int:
    return _reduced(eqn) * (2 if _is_complex(eqn.outvars[0]) else 1)


def _combiner(count: Callable[[Any], int]) -> Rule:
    """The work of the jaxpr that combines two elements, `count(eqn)` times."""

    def rule(eqn: Any) -> tuple[float, float] | None:
        works = [work(e) for e in eqn.params["jaxpr"].eqns]
        total = Work.sum(w for w in works if w)
        return None if None in works else (total.flops * count(eqn), total.transcendentals * count(eqn))

    return rule


def _cumulative(eqn: Any) -> int:
    """One per element but the first along the axis, computed one after the other."""
    n = eqn.invars[0].aval.shape[eqn.params["axis"]]
    return _out(eqn) // max(n, 1) * max(n - 1, 0)


def _cumulative_logsumexp(eqn: Any) -> tuple[int, int]:  # max(a, b) + log1p(exp(-|a - b|))
    return 5 * _cumulative(eqn), 2 * _cumulative(eqn)


def _window(eqn: Any) -> int:
    return _out(eqn) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _window_choice(eqn: Any) -> int:
    """The choice of an element of each window, and an addition for it."""
    return _size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"])


def _sort(eqn: Any) -> int:  # Θ(n log n) comparisons of the keys
    n = eqn.invars[0].aval.shape[eqn.params["dimension"]]
    return _size(eqn.invars[0]) * eqn.params["num_keys"] * math.ceil(math.log2(max(n, 1)))


def _fft(eqn: Any) -> float:
    lengths = eqn.params["fft_lengths"]
    values = max(_size(eqn.invars[0]), _size(eqn.outvars[0]))
    is_real = not (_is_complex(eqn.invars[0]) and _is_complex(eqn.outvars[0]))
    return (2.5 if is_real else 5) * values * math.log2(max(math.prod(lengths), 1))


def _matrices(flops: Callable[[int, int], float]) -> Rule:
    """`flops(m, n)` of each [m, n] matrix, m ≥ n, in the first operand; four times as many where it is complex."""

    def rule(eqn: Any) -> float:
        *batch, m, n = eqn.invars[0].aval.shape
        return math.prod(batch) * flops(max(m, n), min(m, n)) * (4 if _is_complex(eqn.invars[0]) else 1)

    return rule


_householder = _matrices(lambda m, n: 2 * n**2 * (m - n / 3))


def _qr(eqn: Any) -> float:
    full_q = _matrices(lambda m, n: 4 * (m * m * n - m * n * n + n**3 / 3))
    return _householder(eqn) + (full_q if eqn.params["full_matrices"] else _householder)(eqn)


def _svd(eqn: Any) -> float:
    if not eqn.params["compute_uv"]:
        return _matrices(lambda m, n: 4 * m * n**2 - 4 * n**3 / 3)(eqn)
    if eqn.params["full_matrices"]:
        return _matrices(lambda m, n: 4 * m * m * n + 22 * n**3)(eqn)
    return _matrices(lambda m, n: 6 * m * n**2 + 20 * n**3)(eqn)


def _triangular_solve(eqn: Any) -> float:
    n = eqn.invars[0].aval.shape[-1]
    return n * _size(eqn.invars[1]) * (4 if _is_complex(eqn.invars[1]) else 1)


def _random(eqn: Any) -> float | None:
    """Threefry: 20 rounds of add, rotate (3) and xor, and 17 additions of keys, for two words; others are unknown."""
    dtypes = (str(getattr(v.aval, "dtype", "")) for v in (*eqn.invars, *eqn.outvars))
    if "threefry" not in eqn.primitive.name and not any("fry" in dtype for dtype in dtypes):
        return None
    word_count = sum(nbytes(v.aval) for v in eqn.outvars) / 4
    return 117 * math.ceil(word_count / 2)


# ------------------------------------------------------------------------------------------------ the table

_RULES: dict[str, Rule] = {}


def _family(rule: Rule, names: str) -> None:
    for name in names.split():
        assert name not in _RULES, f"{name} has two rules"
        _RULES[name] = rule


_VIEWS = frozenset(
    """reshape squeeze expand_dims stop_gradient name optimization_barrier pvary reshard sharding_constraint layout_constraint
    random_wrap random_unwrap to_edtype from_edtype bitcast_convert_type""".split()  # noqa: SIM905
)
_MOVES = """broadcast_in_dim broadcast_to iota transpose rev concatenate pad split stack unstack tile copy copy_p device_put real
imag complex slice dynamic_slice gather dynamic_update_slice scatter get swap new_ref freeze empty empty2 dimension_size"""
_MESSAGES = "ppermute all_gather all_gather_invariant all_to_all pbroadcast axis_index platform_index preduced"
_EFFECTS = (
    """debug_callback debug_print create_token after_all dce_sink lu_pivots_to_permutation random_seed random_clone"""
)
_COMPARED = """max min sign abs floor ceil round eq ne lt le gt ge eq_to lt_to le_to and or xor not is_finite select_n clamp
rem nextafter convert_element_type reduce_precision shift_left shift_right_logical shift_right_arithmetic population_count clz
mulhi"""
_APPROXIMATED = """exp exp2 expm1 log log1p log2 sqrt rsqrt cbrt pow sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh
atanh erf erfc erf_inv lgamma digamma polygamma zeta igamma igammac igamma_grad_a bessel_i0e bessel_i1e
regularized_incomplete_beta"""

_family(lambda eqn: 0, f"{_MOVES} {_MESSAGES} {_EFFECTS}")
_family(_additive, "add sub add_any neg conj")
_family(_additive, "psum psum_invariant pmax pmin reduce_scatter unreduced_psum unreduced_reduce_scatter")
_family(_multiplicative, "mul div square")
_family(_elementwise(1, 1), _COMPARED)
_family(_elementwise(2, 2), "one_minus_square")
_family(lambda eqn: (0, _out(eqn)), _APPROXIMATED)
_family(lambda eqn: (3 * _out(eqn), _out(eqn)), "logistic")  # 1 / (1 + exp(-x))
_family(_power, "integer_pow")
_family(lambda eqn: 2 * (len(eqn.invars) - 2) * _out(eqn), "polynomial")  # Horner's scheme
_family(_contraction, "dot_general")
_family(_ragged, "ragged_dot_general")
_family(_convolution, "conv_general_dilated")
_family(_reduction, "reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor")
_family(_combiner(_reduced), "reduce")
_family(lambda eqn: _size(eqn.invars[0]), "argmax argmin")
_family(_cumulative, "cumsum cumprod cummax cummin")
_family(lambda eqn: (5 * _cumulative(eqn), 2 * _cumulative(eqn)), "cumlogsumexp")  # max(a, b) + log1p(exp(-|a - b|))
_family(_window, "reduce_window_sum reduce_window_max reduce_window_min")
_family(_combiner(_window), "reduce_window")
_family(_window_choice, "select_and_scatter_add select_and_gather_add")
_family(_sort, "sort")
_family(lambda eqn: _size(eqn.invars[0]) * math.ceil(math.log2(eqn.params["k"] + 1)), "top_k approx_top_k")  # a heap
_family(lambda eqn: _size(eqn.invars[2]), "scatter-add scatter_sub scatter-sub scatter-mul scatter-min scatter-max")
_family(lambda eqn: _size(eqn.invars[1]), "addupdate")
_family(_fft, "fft")
_family(_matrices(lambda m, n: n**3 / 3), "cholesky")
_family(_matrices(lambda m, n: m * n**2 - n**3 / 3), "lu")
_family(_householder, "geqrf geqp3 householder_product")
_family(_qr, "qr")
_family(_svd, "svd")
_family(_matrices(lambda m, n: 9 * n**3), "eigh")
_family(_matrices(lambda m, n: 25 * n**3), "eig schur")
_family(_matrices(lambda m, n: 10 * n**3 / 3), "hessenberg")
_family(_matrices(lambda m, n: 4 * n**3 / 3), "tridiagonal")
_family(_triangular_solve, "triangular_solve")
_family(lambda eqn: 3 * _size(eqn.invars[0]) + 5 * _size(eqn.invars[3]), "tridiagonal_solve")  # elimination, and back
_family(_random, "random_bits random_split random_fold_in threefry2x32")


# ------------------------------------------------------------------------------------------------ bytes


def _declared(eqn: Any) -> Work | None:
    """The `cost_estimate` of a Pallas kernel."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is None:
        return None
    written = min(sum(nbytes(v.aval) for v in eqn.outvars), estimate.bytes_accessed)
    return Work(estimate.flops, estimate.transcendentals, estimate.bytes_accessed - written, written)


# They read as much of their first operand as they return.
_READERS = frozenset({"slice", "dynamic_slice", "gather", "get"})
# They write as much of their first operand as the update has, which is the operand of this number; so do scatters, of 2.
_UPDATES = {"dynamic_update_slice": 1, "swap": 1, "addupdate": 1}


def _traffic(eqn: Any) -> tuple[float, float]:
    """Bytes read and written; literals take none."""
    name = eqn.primitive.name
    read = sum(nbytes(v.aval) for v in dict.fromkeys(v for v in eqn.invars if isinstance(v, _jax.Var)))
    written = sum(nbytes(v.aval) for v in eqn.outvars if not _jax.dropped(v))
    if name == "empty2":
        return 0, 0
    if name in _READERS:
        return read - nbytes(eqn.invars[0].aval) + written, written
    update = 2 if name.startswith("scatter") else _UPDATES.get(name)
    if update is None:
        return read, written
    changed = nbytes(eqn.invars[update].aval)
    is_combined = name not in ("dynamic_update_slice", "scatter")  # with the elements that it replaces
    return read - nbytes(eqn.invars[0].aval) + changed * is_combined, changed
