"""Run the selected parts, print their tables and targets, and write the results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib
from funcgrad.transforms.core.report import Report, Table

from .interleaving import Figure

PARTS = (
    "gradients",
    "dispatch",
    "training",
    "rewriting",
    "recording",
    "loops",
    "evaluations",
    "chunks",
    "budgets",
    "searching",
    "faults",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 1 if a check finds a figure out of its bounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare funcgrad with JAX.")
    parser.add_argument("which", nargs="*", metavar="part", help=f"one of {', '.join(PARTS)}; all parts by default")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="a fast test of the code; the figures are not meaningful")
    parser.add_argument(
        "--check", action="store_true", help="check the bounds of benchmarks/bounds.py; status 1 if one is missed"
    )
    options = parser.parse_args(arguments)
    if unknown := {*options.which} - {*PARTS}:
        parser.error(f"no part is named {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")

    if options.quick:
        jax.config.update("jax_disable_most_optimizations", True)  # LLVM takes most of the time else

    results, parts = machine() | {"quick": options.quick}, {}
    print(" ".join(f"{name} {value}" for name, value in results.items()))
    if options.check:
        check = importlib.import_module("benchmarks.check")
        figures = list(check.figures(options.quick))
        print(targets("check", figures))
        return 0 if options.quick or all(figure.is_met for figure in figures) else 1
    for name in options.which or PARTS:
        part, start_s = importlib.import_module(f"benchmarks.{name}"), time.perf_counter()
        rows = part.run(options.quick)
        figures = part.figures(rows)
        parts[name] = {
            "elapsed_s": time.perf_counter() - start_s,
            "rows": rows,
            "figures": [dataclasses.asdict(f) | {"is_met": f.is_met} for f in figures],
        }
        print(table(name, part.COLUMNS, rows))
        print(targets(f"{name}: targets", figures))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**results, "parts": parts}, file, indent=2)
    return 0


def targets(title: str, figures: Sequence[Figure]) -> Report:
    """Figures beside their targets."""
    rows = [{**vars(f), "target": f.target, "": "ok" if f.is_met else "missed"} for f in figures]
    return table(title, {"name": "", "value": ".3f", "target": "", "": ""}, rows)


def machine() -> dict[str, Any]:
    """The versions and the hardware of this machine."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
    }


def table(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> Report:
    """Rows as a table; `columns` gives the format of each, "" for text."""
    cells = [[format(row[name], spec) for name, spec in columns.items()] for row in rows]
    align = "".join(">" if spec else "<" for spec in columns.values())
    return Report((Table(cells, list(columns), align, title),))


if __name__ == "__main__":
    sys.exit(main())
