"""Numbers in words, and rows in columns."""

from __future__ import annotations

from collections.abc import Sequence


def bytes_in_words(n: float) -> str:
    """As "1.5 MiB"."""
    return _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def count_in_words(n: float, unit: str = "") -> str:
    """As "1.5 G", with the unit behind: "1.5 GFLOP"."""
    return _scaled(n, 1000, tuple(f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P", "E")))


def seconds_in_words(t: float) -> str:
    """As "1.5 ms"."""
    return _scaled(t * 1e9, 1000, ("ns", "µs", "ms", "s"))


def rows_in_columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """One line per row; all but the last `left` columns are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = len(widths) - left
    cells = lambda row: (
        x.rjust(w) if k < right else x.ljust(w) for k, (x, w) in enumerate(zip(row, widths, strict=True))
    )
    return ["  ".join(cells(row)).rstrip() for row in rows]


def _scaled(n: float, base: int, units: Sequence[str]) -> str:
    k = 0
    while round(n, 1) >= base and k < len(units) - 1:
        n, k = n / base, k + 1
    return f"{n:,.{1 if k or n != round(n) else 0}f} {units[k]}".rstrip()
