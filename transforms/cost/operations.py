"""What one operation costs: its FLOPs and transcendentals by primitive, its bytes by its operands.

The table below has one line per family of primitives. What is on no line is unknown, and said to be.

- A FLOP is one arithmetic operation on numbers of any type, comparison, selection and conversion among them, as XLA's
  `HloCostAnalysis` counts; a multiply-add is two. A complex multiplication is 6 FLOPs, an addition 2.
- Functions that hardware approximates (exp, log, tanh, …) are counted apart, one transcendental per element.
- Bytes are those of the operands that are read and the results that are written, each equation on its own, nothing fused.
  Slices and gathers read what they return; updates write what they change. What only gives a value another shape has none.

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
    """The work of an equation without sub-graphs, done once; None where it is unknown."""
    if eqn.primitive.name in _DECLARED:
        return _DECLARED[eqn.primitive.name](eqn)
    rule = _RULES.get(eqn.primitive.name)
    found = rule(eqn) if rule else None
    if found is None:
        return None
    flops, transcendentals = found if isinstance(found, tuple) else (found, 0)
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


# ------------------------------------------------------------------------------------------------ how families count


def _size(v: Any) -> int:
    return math.prod(getattr(v.aval, "shape", ()))


def _out(eqn: Any) -> int:
    return sum(map(_size, eqn.outvars))


def _is_complex(v: Any) -> bool:
    return jax.dtypes.issubdtype(v.aval.dtype, np.complexfloating)


def _none(eqn: Any) -> int:
    return 0


def _elementwise(eqn: Any, mul: int = 1) -> int:
    """One per element of the result; `mul` of them, if it is complex."""
    return _out(eqn) * (mul if _is_complex(eqn.outvars[0]) else 1)


def _additive(eqn: Any) -> int:
    return _elementwise(eqn, 2)


def _multiplicative(eqn: Any) -> int:
    return _elementwise(eqn, 6)


def _approximated(eqn: Any) -> tuple[int, int]:
    return 0, _out(eqn)


def _logistic(eqn: Any) -> tuple[int, int]:  # 1 / (1 + exp(-x))
    return 3 * _out(eqn), _out(eqn)


def _one_minus_square(eqn: Any) -> int:
    return 2 * _out(eqn)


def _power(eqn: Any) -> int:
    """Repeated squaring, and a division for a negative exponent."""
    n = abs(eqn.params["y"])
    multiplications = n.bit_length() - 1 + n.bit_count() - 1 if n else 0
    return multiplications * _multiplicative(eqn) + (_multiplicative(eqn) if eqn.params["y"] < 0 else 0)


def _polynomial(eqn: Any) -> int:  # Horner's scheme
    return 2 * (len(eqn.invars) - 2) * _out(eqn)


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


def _reduction(eqn: Any) -> int:
    return max(_size(eqn.invars[0]) - _size(eqn.outvars[0]), 0) * (2 if _is_complex(eqn.outvars[0]) else 1)


def _general_reduction(eqn: Any) -> tuple[float, float] | None:
    n = max(_size(eqn.invars[0]) - _size(eqn.outvars[0]), 0)
    return _combiner(eqn.params["jaxpr"], n)


def _combiner(jaxpr: Any, n: int) -> tuple[float, float] | None:
    found = [work(eqn) for eqn in jaxpr.eqns]
    total = Work.sum(w for w in found if w)
    return (total.flops * n, total.transcendentals * n) if None not in found else None


def _search(eqn: Any) -> int:  # a comparison per element
    return _size(eqn.invars[0])


def _cumulative(eqn: Any) -> int:
    """One per element but the first along the axis, computed one after the other."""
    n = eqn.invars[0].aval.shape[eqn.params["axis"]]
    return _out(eqn) // max(n, 1) * max(n - 1, 0)


def _cumulative_logsumexp(eqn: Any) -> tuple[int, int]:  # max(a, b) + log1p(exp(-|a - b|))
    return 5 * _cumulative(eqn), 2 * _cumulative(eqn)


def _window(eqn: Any) -> int:
    return _out(eqn) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _window_general(eqn: Any) -> tuple[float, float] | None:
    return _combiner(eqn.params["jaxpr"], _window(eqn))


def _window_choice(eqn: Any) -> int:
    """Which element of each window counts, and an addition for it."""
    return _size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"])


def _sort(eqn: Any) -> int:  # Θ(n log n) comparisons of the keys
    n = eqn.invars[0].aval.shape[eqn.params["dimension"]]
    return _size(eqn.invars[0]) * eqn.params["num_keys"] * math.ceil(math.log2(max(n, 1)))


def _top_k(eqn: Any) -> int:  # a heap of k elements
    return _size(eqn.invars[0]) * math.ceil(math.log2(eqn.params["k"] + 1))


def _update(eqn: Any) -> int:
    return _size(eqn.invars[2])


def _reference_update(eqn: Any) -> int:
    return _size(eqn.invars[1])


def _fft(eqn: Any) -> float:
    lengths = eqn.params["fft_lengths"]
    values = max(_size(eqn.invars[0]), _size(eqn.outvars[0]))
    is_real = not (_is_complex(eqn.invars[0]) and _is_complex(eqn.outvars[0]))
    return (2.5 if is_real else 5) * values * math.log2(max(math.prod(lengths), 1))


def _matrices(eqn: Any, flops: Callable[[int, int], float], operand: int = 0) -> float:
    """`flops(m, n)` of each [m, n] matrix, m ≥ n, in an operand; four times as many where it is complex."""
    v = eqn.invars[operand]
    *batch, m, n = v.aval.shape
    return math.prod(batch) * flops(max(m, n), min(m, n)) * (4 if _is_complex(v) else 1)


def _cholesky(eqn: Any) -> float:
    return _matrices(eqn, lambda m, n: n**3 / 3)


def _lu(eqn: Any) -> float:
    return _matrices(eqn, lambda m, n: m * n**2 - n**3 / 3)


def _householder(eqn: Any) -> float:
    return _matrices(eqn, lambda m, n: 2 * n**2 * (m - n / 3))


def _qr(eqn: Any) -> float:
    is_full = eqn.params["full_matrices"]
    q = lambda m, n: 4 * (m * m * n - m * n * n + n**3 / 3) if is_full else 2 * n**2 * (m - n / 3)
    return _householder(eqn) + _matrices(eqn, q)


def _svd(eqn: Any) -> float:
    if not eqn.params["compute_uv"]:
        return _matrices(eqn, lambda m, n: 4 * m * n**2 - 4 * n**3 / 3)
    is_full = eqn.params["full_matrices"]
    return _matrices(eqn, lambda m, n: (4 * m * m * n + 22 * n**3) if is_full else (6 * m * n**2 + 20 * n**3))


def _eigh(eqn: Any) -> float:
    return _matrices(eqn, lambda m, n: 9 * n**3)


def _eig(eqn: Any) -> float:
    return _matrices(eqn, lambda m, n: 25 * n**3)


def _hessenberg(eqn: Any) -> float:
    return _matrices(eqn, lambda m, n: 10 * n**3 / 3)


def _tridiagonal(eqn: Any) -> float:
    return _matrices(eqn, lambda m, n: 4 * n**3 / 3)


def _triangular_solve(eqn: Any) -> float:
    n = eqn.invars[0].aval.shape[-1]
    return n * _size(eqn.invars[1]) * (4 if _is_complex(eqn.invars[1]) else 1)


def _tridiagonal_solve(eqn: Any) -> float:  # elimination of one diagonal, and back
    return 3 * _size(eqn.invars[0]) + 5 * _size(eqn.invars[3])


def _random(eqn: Any) -> float | None:
    """Threefry: 20 rounds of add, rotate (3) and xor, and 17 additions of keys, for two words; others are unknown."""
    kinds = [str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars) if getattr(v.aval, "dtype", None) is not None]
    if "threefry" not in eqn.primitive.name and not any("fry" in kind for kind in kinds):
        return None
    words = sum(nbytes(v.aval) for v in eqn.outvars) / 4
    return 117 * math.ceil(words / 2)


# ------------------------------------------------------------------------------------------------ the table

_RULES: dict[str, Callable[[Any], Any]] = {}


def _family(rule: Callable[[Any], Any], names: str) -> None:
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
    "debug_callback debug_print create_token after_all dce_sink lu_pivots_to_permutation random_seed random_clone"
)
_COMPARED = """max min sign abs floor ceil round eq ne lt le gt ge eq_to lt_to le_to and or xor not is_finite select_n clamp
rem nextafter convert_element_type reduce_precision shift_left shift_right_logical shift_right_arithmetic population_count clz
mulhi"""
_APPROXIMATED = """exp exp2 expm1 log log1p log2 sqrt rsqrt cbrt pow sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh
atanh erf erfc erf_inv lgamma digamma polygamma zeta igamma igammac igamma_grad_a bessel_i0e bessel_i1e
regularized_incomplete_beta"""

_family(_none, _MOVES)
_family(_none, _MESSAGES)
_family(_none, _EFFECTS)
_family(_additive, "add sub add_any neg conj")
_family(_multiplicative, "mul div square")
_family(_elementwise, _COMPARED)
_family(_approximated, _APPROXIMATED)
_family(_logistic, "logistic")
_family(_one_minus_square, "one_minus_square")
_family(_power, "integer_pow")
_family(_polynomial, "polynomial")
_family(_contraction, "dot_general")
_family(_ragged, "ragged_dot_general")
_family(_convolution, "conv_general_dilated")
_family(_reduction, "reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor")
_family(_general_reduction, "reduce")
_family(_search, "argmax argmin")
_family(_cumulative, "cumsum cumprod cummax cummin")
_family(_cumulative_logsumexp, "cumlogsumexp")
_family(_window, "reduce_window_sum reduce_window_max reduce_window_min")
_family(_window_general, "reduce_window")
_family(_window_choice, "select_and_scatter_add select_and_gather_add")
_family(_sort, "sort")
_family(_top_k, "top_k approx_top_k")
_family(_update, "scatter-add scatter_sub scatter-sub scatter-mul scatter-min scatter-max")
_family(_reference_update, "addupdate")
_family(_additive, "psum psum_invariant pmax pmin reduce_scatter unreduced_psum unreduced_reduce_scatter")
_family(_fft, "fft")
_family(_cholesky, "cholesky")
_family(_lu, "lu")
_family(_householder, "geqrf geqp3 householder_product")
_family(_qr, "qr")
_family(_svd, "svd")
_family(_eigh, "eigh")
_family(_eig, "eig schur")
_family(_hessenberg, "hessenberg")
_family(_tridiagonal, "tridiagonal")
_family(_triangular_solve, "triangular_solve")
_family(_tridiagonal_solve, "tridiagonal_solve")
_family(_random, "random_bits random_split random_fold_in threefry2x32")


# ------------------------------------------------------------------------------------------------ bytes


def _pallas(eqn: Any) -> Work | None:
    """What the author of a kernel declared."""
    declared = eqn.params.get("cost_estimate")
    if declared is None:
        return None
    written = min(sum(nbytes(v.aval) for v in eqn.outvars), declared.bytes_accessed)
    return Work(declared.flops, declared.transcendentals, declared.bytes_accessed - written, written)


_DECLARED = {"pallas_call": _pallas}
_READERS = frozenset({"slice", "dynamic_slice", "gather", "get"})  # of as much of their first operand as they return
_WRITERS = {
    "dynamic_update_slice": 1,
    "swap": 1,
    "addupdate": 1,
}  # of as much of it as the update, which is this operand


def _traffic(eqn: Any) -> tuple[float, float]:
    """Bytes read and written; numbers are in the code."""
    name = eqn.primitive.name
    read = sum(nbytes(v.aval) for v in dict.fromkeys(v for v in eqn.invars if isinstance(v, _jax.Var)))
    written = sum(nbytes(v.aval) for v in eqn.outvars if not _jax.dropped(v))
    if name == "empty2":
        return 0, 0
    if name in _READERS:
        return read - nbytes(eqn.invars[0].aval) + written, written
    update = 2 if name.startswith("scatter") else _WRITERS.get(name)
    if update is None:
        return read, written
    changed = nbytes(eqn.invars[update].aval)
    is_combined = name not in ("dynamic_update_slice", "scatter")
    return read - nbytes(eqn.invars[0].aval) + changed * is_combined, changed
