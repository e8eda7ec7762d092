"""Parameters of a test of which each run takes the same sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], names: Collection[str]) -> list[Any]:
    """`values` as parameters with their names as ids; all but those of `names` are slow, unless a run takes `--all`."""
    values = list(values)
    unknown = set(names) - {str(value) for value in values}
    assert not unknown, f"no parameters have the names {sorted(unknown)}"
    return [
        pytest.param(value, id=str(value), marks=() if str(value) in names else pytest.mark.rest) for value in values
    ]
