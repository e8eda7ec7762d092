"""Bytes, counts and seconds as text, and `memory=` back to bytes."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

from ..core.errors import OptionError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(n: float) -> str:
    """As "1.5 MiB"."""
    return _scaled(n, 1024, _UNITS)


def parse_bytes(memory: Any) -> int | float:
    """The value of `memory=`: an int of bytes, or a float, the fraction of the temporaries of the program without a budget.

    Raises:
      OptionError: `memory` is no positive number of bytes, as 2**30, "1GiB" or "1.5 GB", and no percentage, as "50%".

    >>> parse_bytes("1.5KiB"), parse_bytes(2000), parse_bytes("50%")
    (1536, 2000, 0.5)
    """
    if isinstance(memory, numbers.Integral) and not isinstance(memory, bool) and int(memory) > 0:
        return int(memory)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]?i?B|%)\s*", memory) if isinstance(memory, str) else None
    if match and (number := float(match[1])) > 0:
        unit = match[2]
        if unit == "%":
            return number / 100
        exponent = "BKMGTP".index(unit[0].upper())
        return math.floor(number * (1024 if "i" in unit else 1000) ** exponent)
    hint = 'a number of bytes, as 2**30 or "1GiB", or a part of the bytes without a budget, as "50%"'
    raise OptionError(f"memory= cannot be {memory!r:.40}.", hint=hint)


def format_count(n: float, unit: str = "") -> str:
    """As "1.5 G", with the unit behind: "1.5 GFLOP"."""
    return _scaled(n, 1000, tuple(f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P", "E")))


def format_seconds(t: float) -> str:
    """As "1.5 ms"."""
    return _scaled(t * 1e9, 1000, ("ns", "µs", "ms", "s"))


def _scaled(n: float, base: int, units: Sequence[str]) -> str:
    k = 0
    while round(n, 1) >= base and k < len(units) - 1:
        n, k = n / base, k + 1
    return f"{n:,.{1 if k or n != round(n) else 0}f} {units[k]}".rstrip()
