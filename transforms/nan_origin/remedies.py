"""What to write instead, for operations and operands that are known to give NaN or infinities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# Operations that are finite where their derivatives are not, and how each is masked.
_MASKED = {
    "sqrt": "jnp.sqrt(jnp.where(ok, x, 1.0))",
    "log": "jnp.log(jnp.where(ok, x, 1.0))",
    "div": "x / jnp.where(ok, y, 1.0)",
    "pow": "jnp.where(ok, x, 1.0) ** p",
    "atan2": "jnp.arctan2(y, jnp.where(ok, x, 1.0))",
}
_MASKED |= {name: f"{f}(jnp.where(ok, x, 1.0))" for name, f in (("rsqrt", "jax.lax.rsqrt"), ("cbrt", "jnp.cbrt"))}
_MASKED |= {
    name: f"jnp.{f}(jnp.where(ok, x, 0.0))" for name, f in (("acos", "arccos"), ("asin", "arcsin"), ("log1p",) * 2)
}
_MASKED["integer_pow"] = _MASKED["pow"]
_SPECTRAL = ("eigh", "svd", "eig", "qr")


def remedy(primitive: str, of: str | None, operands: Sequence[Any], result: Any) -> str | None:
    """A remedy for `primitive`, or for the derivative of `of`; None where no remedy is known.

    Args:
      operands: the `Elements` that it read. result: the element that it computed.
    """
    if any(x.name == "constant" and not np.isfinite(x.values).all() for x in operands if _is_float(x)):
        return "an array that the function closes over holds it: mend that"
    dtype, is_nan = result.dtype, bool(np.isnan(result.values[0]))
    floats = [np.array(x.values) for x in operands if _is_float(x)]
    first, last = (floats[0], floats[-1]) if floats else (np.zeros(0), np.zeros(0))
    if of in _SPECTRAL:
        return f"the derivative of {of} divides by differences of eigenvalues or singular values: keep them apart"
    if of in _MASKED:
        masked = f"jnp.where(ok, {_MASKED[of]}, 0.0)"
        return (
            f"the derivative is not finite there, and 0 times it is NaN behind a mask: mask the operand too, {masked}"
        )
    if primitive == "gather":
        return 'an index is out of bounds: clip it, or say what lies outside with mode="clip" or fill_value='
    if primitive in ("log", "log2", "log1p", "xlogy"):
        if is_nan:
            return (
                "the logarithm of a negative number: jnp.log(jnp.maximum(x, eps)), or mask the operand with jnp.where"
            )
        return "the logarithm of 0: jnp.log(jnp.maximum(x, eps)); of a softmax, jax.nn.log_softmax"
    if primitive in ("sqrt", "rsqrt") and (first < 0).any():
        return "the root of a negative number: jnp.sqrt(jnp.maximum(x, 0.0)), or mask the operand with jnp.where"
    if primitive in ("exp", "exp2", "expm1", "sinh", "cosh"):
        return (
            f"exp overflows {jnp.dtype(dtype).name}: subtract the maximum first, as jax.nn.softmax and jax.nn.logsumexp do; "
            "for log(1 + exp(x)), jax.nn.softplus"
        )
    if primitive in ("div", "rem", "rsqrt") and (last == 0).any():
        return "a division by 0: jnp.where(d == 0, 0.0, x / jnp.where(d == 0, 1.0, d))"
    if primitive in ("pow", "integer_pow") and (first == 0).any():
        return "a negative power of 0: mask the operand with jnp.where before the power is taken"
    if primitive == "pow" and (first < 0).any():
        return "a broken power of a negative number: jnp.abs(x) or jnp.maximum(x, 0.0) first"
    if primitive in ("asin", "acos", "atanh", "acosh", "erf_inv"):
        return f"{primitive} is not defined there: clip the operand, jnp.clip(x, -1 + eps, 1 - eps)"
    if primitive == "cholesky":
        return "the matrix is not positive definite: add to its diagonal, a + eps * jnp.eye(n)"
    if primitive in ("triangular_solve", "custom_linear_solve", "lu", "tridiagonal_solve"):
        return "the matrix is singular: add to its diagonal, or jnp.linalg.lstsq"
    if primitive == "mul" and is_nan:
        return "0 times infinity: keep the infinity out with jnp.where before the product"
    if primitive in ("sub", "add", "add_any", "reduce_sum") and is_nan:
        return (
            "an infinity less an infinity: of a mask of -inf some row is masked throughout; use a large finite number"
        )
    is_half = jnp.dtype(dtype).itemsize <= 2
    if not is_nan and (is_half or floats):
        limit = f"{jnp.dtype(dtype).name} ends at {float(jnp.finfo(dtype).max):.3g}"
        return f"{limit}: {'compute this in float32, or scale it' if is_half else 'scale the operands'} down first"
    return None


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
